"""Every figure (drawing only), players and widgets."""
