"""The papers' ablations: trained, drawn, measured and told apart by `python -m models.ablations`."""
