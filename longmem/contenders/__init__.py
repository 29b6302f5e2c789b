"""Ways to let a language model use more text than its window holds: one file each, all behind one interface
(`longmem.contenders.contender`), all on the same backbone."""
