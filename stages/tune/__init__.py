"""Going through the decoder blocks after the search: rooms joined for it alone."""
