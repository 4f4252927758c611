"""Feature visualisation: pictures that are made to excite a unit, from noise, by gradient ascent.

`image`: how numbers become pictures. `objectives`: what is maximised. `render`: the ascent. `unit`: pictures of units.
"""
