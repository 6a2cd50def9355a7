"""What only a GPU can show. `make test` runs none of it."""
