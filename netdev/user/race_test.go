//go:build race

package user

// raceEnabled: pools drop at random what is put into them.
const raceEnabled = true
