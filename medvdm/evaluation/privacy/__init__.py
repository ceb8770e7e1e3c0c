"""Privacy audits: what a trained model gives away of the images that it was trained on."""
