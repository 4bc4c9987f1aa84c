"""Made from radixmesh.proto by `make proto`; never edited."""
