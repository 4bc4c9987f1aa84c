"""Checks: slots, page tables and pages, with dirty memory, sharing and late rows."""

from __future__ import annotations

from backends.api.conformance.bench import (
    ASKS,
    PAGE,
    Ask,
    Opener,
    Weights,
    blank,
    compare,
    generate,
    one,
    prompt,
    take,
)


def tenants(open: Opener) -> None:
    """A slot's new tenant never sees the old one, nor its seed."""
    host = open()
    asks = [Ask(prompt=prompt(6), values={"temperature": 1.0, "seed": 5}), Ask(prompt=prompt(7), make=4)]
    first = [one(host, ask) for ask in asks]
    one(host, Ask(prompt=prompt(16, seed=9), make=20, values={"temperature": 1.0, "seed": 9}))
    compare(first, [one(host, ask) for ask in asks], asks)


def stale(open: Opener) -> None:
    """Stale entries of a slot's page table are neither read nor written: their pages belong to another text by then."""
    host, ids = open(), prompt(16, seed=2)
    want = [one(host, Ask(prompt=ids[:3], make=9)).tokens, one(host, Ask(prompt=ids, make=9)).tokens]
    old = host.open()
    host.run([(old, host.row(old, prompt(16, seed=3)))])
    host.close(old)
    spare = [[free.pop(0) for _ in range(8)] for free in host.free]  # the old text's pages are kept for `heir`
    tenant, made = host.open(), blank(2)
    rows = [(tenant, host.row(tenant, ids[:3]))]
    host.free = [kept + free for kept, free in zip(spare, host.free, strict=True)]
    heir = host.open()
    take(host.run(rows), made[:1])
    take(host.run([(heir, host.row(heir, ids))]), made[1:])
    assert tenant.slot == old.slot
    assert heir.pages == old.pages
    for _ in range(8):
        spare = [[free.pop(0) for _ in range(4)] for free in host.free]  # the tenant grows over the stale entries
        take(host.run([(text, host.row(text, [-1])) for text in (tenant, heir)]), made)
        host.free = [kept + free for kept, free in zip(spare, host.free, strict=True)]
    host.close(heir)
    host.close(tenant)
    assert made == want


def prefixes(open: Opener) -> None:
    """Two slots read the same pages: each equals its whole prompt alone."""
    host, common = open(), prompt(2 * PAGE, seed=4)
    asks = [Ask(prompt=common + prompt(n, seed=n), make=6) for n in (1, 3)]
    want = [one(host, ask).tokens for ask in asks]
    root = host.open()
    host.run([(root, host.row(root, common, output=0))])
    texts, made = [host.open(root, len(common)) for _ in asks], blank(len(asks))
    for step in range(6):
        feed = [ask.prompt[len(common) :] if step == 0 else [-1] for ask in asks]
        take(host.run([(text, host.row(text, f)) for text, f in zip(texts, feed, strict=True)]), made)
    for text in (*texts, root):
        host.close(text)
    assert made == want


def zombies(open: Opener) -> None:
    """A row that goes on after its request has ended harms nobody: neither the next tenant of its slot and pages, nor
    a text that shares its committed pages."""
    host = open()
    if host.limits.depth < 2:
        return
    next_ask = Ask(prompt=prompt(10, seed=6), make=6)
    common = prompt(2 * PAGE, seed=5)
    want = [one(host, Ask(prompt=[*common, 3], make=4)).tokens, one(host, next_ask).tokens]
    dead, made = host.open(), blank(2)
    host.run([(dead, host.row(dead, common))])
    friend = host.open(dead, len(common))
    first = host.enqueue([(dead, host.row(dead, [-1]))])
    second = host.enqueue([(dead, host.row(dead, [-1]))])  # the request ended with the first
    host.backend.collect(first)
    shared = [pages[:2] for pages in dead.pages]
    dead.owned = [[p for p in own if p not in keep] for own, keep in zip(dead.owned, shared, strict=True)]
    host.close(dead)
    heir = host.open()
    newcomer = heir, host.row(heir, next_ask.prompt)
    third = host.enqueue([(friend, host.row(friend, [3])), newcomer])
    host.backend.collect(second)
    take(host.backend.collect(third), made)
    assert heir.slot == dead.slot
    assert heir.pages[0][0] == dead.pages[0][2]
    for _ in range(3):
        take(host.run([(friend, host.row(friend, [-1])), (heir, host.row(heir, [-1]))]), made)
    for _ in range(2):
        take(host.run([(heir, host.row(heir, [-1]))]), made[1:])
    for text in (heir, friend):
        host.close(text)
    for free, pages in zip(host.free, shared, strict=True):
        free.extend(pages)
    assert made == want


def windows(open: Opener) -> None:
    """Pages behind the window go to other texts at once, the table's base moves up, and nothing changes."""
    host, asks = open(), [Ask(prompt=prompt(21, seed=7), make=12), Ask(prompt=prompt(18, seed=8), make=12)]
    want = [one(host, ask).tokens for ask in asks]
    texts, made = [host.open() for _ in asks], blank(len(asks))
    for at in (0, 7, 14):
        for text, ask in zip(texts, asks, strict=True):
            host.trim(text, at)
            part = ask.prompt[at : at + 7]
            result = host.run([(text, host.row(text, part, output=int(at == 14)))])
            if at == 14:
                take(result, made[texts.index(text) : texts.index(text) + 1])
    heir = host.open(texts[0], 3 * PAGE)  # seated where its first entry is not position 0
    host.trim(heir, 3 * PAGE + 1)
    assert heir.base[1] > 0 or not host.limits.groups[1].window
    for _ in range(11):
        for text in texts:
            host.trim(text, text.upper)
        take(host.run([(text, host.row(text, [-1])) for text in texts]), made)
    for text in texts:
        host.close(text)
    host.close(heir)
    assert made == want


def garbage(open: Opener) -> None:
    """NaN in pages that a row should not see, and in the unused rest of its last page, is harmless."""
    host = open()
    want = [one(host, ask) for ask in ASKS]
    host.backend.load(Weights(poison=[7]), version=1)
    texts = [host.open() for _ in range(4)]
    for text in texts:
        for _ in range(host.limits.max_len // host.limits.max_tokens):
            host.run([(text, host.row(text, [7] * host.limits.max_tokens, output=0))])
    assert not any(host.free), "the texts fill every page"
    for text in texts:
        host.close(text)
    host.backend.load(Weights())
    compare(want, generate(host, ASKS), ASKS)
    compare(want, [one(host, ask) for ask in ASKS], ASKS)


def copies(open: Opener) -> None:
    """A fork: full pages shared, the last one copied before the forward, in every group; and in order, as a page may be
    copied on, and over."""
    host, ids = open(), prompt(2 * PAGE + 2, seed=3)
    if not host.limits.max_copies:
        return
    want = one(host, Ask(prompt=ids, make=5)).tokens
    root, made = host.open(), blank(2)
    take(host.run([(root, host.row(root, ids))]), made[:1])
    child = host.open(root, 2 * PAGE)
    child.start = child.upper = len(ids) - 1
    row = host.row(child, ids[-1:])
    pairs = []
    for g in range(len(host.limits.groups)):
        spare, last, mine = host.free[g][-1], root.pages[g][2], child.pages[g][2]
        pairs += [(g, 0, root.pages[g][0], mine), (g, 0, last, spare), (g, 0, spare, mine), (g, 0, mine, spare)]
    take(host.run([(child, row)], copies=pairs), made[1:])
    for _ in range(4):
        take(host.run([(text, host.row(text, [-1])) for text in (root, child)]), made)
    for text in (child, root):
        host.close(text)
    assert made == [want, want]
