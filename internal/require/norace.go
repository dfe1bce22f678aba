//go:build !race

package require

// Race tells whether the race detector is compiled in.
const Race = false
