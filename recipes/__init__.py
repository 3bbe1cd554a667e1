"""YAML only: `config.yaml` puts one option of each group together, `experiment/` holds whole runs."""
