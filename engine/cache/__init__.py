"""Who owns which page. Every page has one owner: the free list, the radix tree, or a sequence."""
