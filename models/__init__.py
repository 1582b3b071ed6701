"""Reference models, and the scripts that train and sample them."""
