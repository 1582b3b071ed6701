"""The benchmark suites: what is timed, how, and how the tables are made (README.md)."""
