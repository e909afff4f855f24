class Encoder: pass
