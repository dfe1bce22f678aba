package vhostuser_test

import (
	"net"
	"testing"

	"github.com/vhostd/vhostd/internal/vhosttest"
)

func TestMain(m *testing.M) {
	warm, _ := net.ListenUnix("unixpacket", &net.UnixAddr{Name: "@", Net: "unixpacket"}) // the poller's descriptors
	if warm != nil {
		warm.Close()
	}
	vhosttest.Main(m)
}
