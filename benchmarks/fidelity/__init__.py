"""The fidelity benchmark: does a method find the circuit that is really the cause?

1. *Planted* (`fidelity.planted`): every method on every network of `viscircuits.planted`, whose circuit is known.
2. *Agreement* (`fidelity.agreement`): every score beside what removing one unit or edge at a time does.
3. *Removal* (`fidelity.removal`): circuits of photographed concepts in pretrained networks, found on some
   photographs, removed, and tested on others.

Each cell of each part is kept in a work folder as soon as it is known (`fidelity.store`), with a digest of the
method's source; a run that was killed goes on where it stood, and a method that was changed is run again alone.
`fidelity.summary` puts intervals around the cells, `fidelity.page` writes them down.

Methods come from `viscircuits.methods.METHODS`, networks from `viscircuits.planted.PLANTED`: who enters something
there finds it here.
"""
