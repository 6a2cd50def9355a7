"""Real engines, installed and started: `make engines` (docs/ENGINES.md).

What an engine has to do is the same as everywhere (`tests.engines.test_conformance`). Real are the
engine, its protocol, its deaths; the model is a small one with random weights (`model`), since no
package has one in the format that they read, and nothing here depends on what a text means.
"""
