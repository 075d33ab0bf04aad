"Predictions with batch norms folded into the convolutions before them."
