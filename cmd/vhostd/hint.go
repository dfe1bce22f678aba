package main

import (
	"fmt"
	"io"
	"net"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/virtio"
)

// printHint tells the QEMU command line that uses this back-end.
func printHint(w io.Writer, s settings, path string, be *backend.Backend) {
	fmt.Fprintf(w, "Start QEMU with (the memory's size in both places):\n\n%s\n", qemuCommand(s, path, be.Stats().Device.Pairs))
	if !s.client {
		fmt.Fprintf(w, "reconnect=1 lets the guest survive a restart of vhostd; since QEMU 9.2 it is written reconnect-ms=1000.\n")
	}
	fmt.Fprintln(w)
}

// qemuCommand is the part of QEMU's command line that is about the network.
func qemuCommand(s settings, path string, pairs int) string {
	program, machine := "qemu-system-x86_64", "q35"
	if runtime.GOARCH == "arm64" {
		program, machine = "qemu-system-aarch64", "virt"
	}
	chardev, netdev, device := ",reconnect=1", "", ""
	if s.client {
		chardev = ",server=on"
	}
	if pairs > 1 {
		netdev = fmt.Sprintf(",queues=%d", pairs)
		device = fmt.Sprintf(",mq=on,vectors=%d", 2*pairs+2) // one for each queue, the control queue and changes of the configuration
	}
	if s.mac != [6]byte{} {
		device += ",mac=" + net.HardwareAddr(s.mac[:]).String()
	}
	if s.mtu != 0 && s.disable&virtio.FNetMTU == 0 {
		device += fmt.Sprintf(",host_mtu=%d", s.mtu)
	}
	return fmt.Sprintf(`  %s -machine %s,accel=kvm:tcg,memory-backend=mem -m 1G \
    -object memory-backend-memfd,id=mem,size=1G,share=on \
    -chardev %s \
    -netdev vhost-user,id=net0,chardev=vhostd0%s \
    -device virtio-net-pci,netdev=net0,rx_queue_size=1024,tx_queue_size=1024%s ...
`, program, machine, quote("socket,id=vhostd0,path="+qemuPath(path)+chardev), netdev, device)
}

// qemuPath is a path as QEMU's options take it: a comma is doubled, and QEMU may run in another directory.
func qemuPath(path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	return strings.ReplaceAll(path, ",", ",,")
}

var plain = regexp.MustCompile(`^[A-Za-z0-9_./,:=@%+-]+$`)

// quote makes a word that a shell leaves as it is.
func quote(s string) string {
	if plain.MatchString(s) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
