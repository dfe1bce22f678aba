package vhostuser

import "net"

// Sock is the connection's socket.
func (c *Conn) Sock() *net.UnixConn { return c.sock }
