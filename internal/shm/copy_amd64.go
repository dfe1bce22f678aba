//go:build !race

package shm

import "golang.org/x/sys/cpu"

// wide: the processor stores 64 bytes at once, and is of a generation that does not run slower for it (Ice Lake and later, Zen 4 and later): these have VBMI2.
var wide = cpu.X86.HasAVX512F && cpu.X86.HasAVX512VBMI2

// copyWide copies src to dst, both of one length, 64 bytes or more.
//
//go:noescape
func copyWide(dst, src []byte)
