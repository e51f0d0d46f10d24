"""The long part of the tests: `make soak`. Each module is one part of it, or what several share."""
