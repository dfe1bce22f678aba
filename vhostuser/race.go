//go:build race

package vhostuser

import "sync/atomic"

// For the race detector, what came before a message was sent comes before what follows its arrival, as where the ends are threads of one process: a
// socket's system calls do not tell it.
var messages atomic.Int64

func sending()  { messages.Add(1) }
func received() { messages.Load() }
