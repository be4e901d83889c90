"""What holds a program on its hook: links and their like, and the ways onto each kind of hook."""
