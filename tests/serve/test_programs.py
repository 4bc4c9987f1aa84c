"""What /metrics says of programs and padding, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from backends.api.protocol import Sources, Status
from engine.serve.metrics import describe


class Only(Collector):
    def collect(self) -> Iterator[Metric]:
        status = Status(
            ready=True,
            version=0,
            programs=7,
            compiles_after_ready=0,
            device="cpu",
            sources=Sources(planned=9, bundle=4, cache=2, compiler=1, seconds=2.5),
            buckets=((1, 10, 10), (8, 5, 33), (64, 0, 0)),
        )
        return describe("m", status)


def test_programs_and_padding_are_told() -> None:
    registry = CollectorRegistry()
    registry.register(Only())
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            assert sample.labels.pop("model_name") == "m"
            if not sample.name.endswith("_created"):
                found[(sample.name, *sample.labels.values())] = sample.value
    assert found == {
        ("radixmesh:programs_planned",): 9,
        ("radixmesh:programs_total", "bundle"): 4,
        ("radixmesh:programs_total", "cache"): 2,
        ("radixmesh:programs_total", "compiler"): 1,
        ("radixmesh:program_seconds_total",): 2.5,
        ("radixmesh:bucket_steps_total", "1"): 10,
        ("radixmesh:bucket_steps_total", "8"): 5,
        ("radixmesh:bucket_steps_total", "64"): 0,
        ("radixmesh:bucket_tokens_total", "1"): 10,
        ("radixmesh:bucket_tokens_total", "8"): 33,
        ("radixmesh:bucket_tokens_total", "64"): 0,
        ("radixmesh:bucket_padding_total", "1"): 0,
        ("radixmesh:bucket_padding_total", "8"): 7,
        ("radixmesh:bucket_padding_total", "64"): 0,
    }
