"""Where the wanted state comes from: today files; each source yields `hookline.model` resources."""
