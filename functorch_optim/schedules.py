def linear(a,b,c): return lambda t: a+(b-a)*(t/c).clamp(max=1)
