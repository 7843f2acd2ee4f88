"""An English-to-French translator on ``lstm_fast.LSTM``: text, subwords, model, training, search, scores, pictures."""
