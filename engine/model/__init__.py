"""Models described once, as data: the layers, the parameters' names and shapes, where a checkpoint keeps them."""
