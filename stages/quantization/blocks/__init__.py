"""Run decoder blocks in torch to tune weights by a block's output."""
