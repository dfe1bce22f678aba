//go:build race

package backend_test

// The race detector allocates on its own account.
const raceDetector = true
