"""``kvfarm ablate``: what each optimisation is worth, one turned on after the other."""
