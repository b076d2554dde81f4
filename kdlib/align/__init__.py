"""Where two tokenizations of one text meet: common byte boundaries, shared vocabulary, one's tokens in the other's."""
