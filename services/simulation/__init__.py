"""Parts that stand in for time, network and model, exact enough to prove things about the real rest."""
