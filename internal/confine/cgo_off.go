//go:build !cgo || race

package confine

const cgo = false
