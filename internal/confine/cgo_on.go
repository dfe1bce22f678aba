//go:build cgo && !race

package confine

const cgo = true
