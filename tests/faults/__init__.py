"""The fault matrix, and the tests of what `unbroken.chaos` does to processes and links."""
