"""How to show a row and a latent: what reports and explorers stand on."""
