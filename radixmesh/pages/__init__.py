"""Reports as HTML pages: the frame that all share, and charts as inline SVG."""
