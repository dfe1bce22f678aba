//go:build race

package require

// Race tells whether the race detector is compiled in: it allocates on its own account, and pools drop at random what is put into them.
const Race = true
