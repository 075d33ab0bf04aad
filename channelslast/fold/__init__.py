"Batch norms folded into the convolutions before them, for predictions."
