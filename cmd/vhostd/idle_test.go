package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/virtio"
)

// wakeUps counts how often the threads of a process have gone to sleep by themselves, each of which a wake-up ended, or will.
func wakeUps(t *testing.T, pid int) (n int) {
	t.Helper()
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // a thread that has ended
		}
		_, rest, _ := strings.Cut(string(text), "\nvoluntary_ctxt_switches:")
		line, _, _ := strings.Cut(rest, "\n")
		count, err := strconv.Atoi(strings.TrimSpace(line))
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		n += count
	}
	return n
}

// freeUDP is an address that nobody has at the moment.
func freeUDP(t *testing.T) string {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return c.LocalAddr().String()
}

// TestIdle: with a guest that is quiet, all threads of vhostd sleep, whatever the network. Polling, Go's monitor and its collector may take a while to end;
// sooner or later there is a second with hardly a wake-up.
func TestIdle(t *testing.T) {
	for name, args := range map[string][]string{
		"null":        {"--net", "null"},
		"one thread":  {"--net", "null", "--workers", "pair"},
		"many queues": {"--net", "null", "--queues", "8"},
		"echo":        {"--net", "null,echo=on"},
		"user":        {"--net", "user"},
		"tunnel":      {"--net", "dgram:local=" + freeUDP(t) + ",remote=127.0.0.1:9"},
		"metrics":     {"--net", "null", "--metrics", "127.0.0.1:0"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := socketIn(t)
			p := start(t, append([]string{"--socket-path", path}, args...)...)
			g := vhosttest.Start(t, nil, vhosttest.Options{Path: path})
			for range frames {
				if err := g.Send(0, virtio.NetHdr{}, make([]byte, 64), nil); err != nil {
					t.Fatal(err)
				}
			}
			eventually(t, "a second of sleep", func() bool {
				before := wakeUps(t, p.cmd.Process.Pid)
				time.Sleep(time.Second)
				n := wakeUps(t, p.cmd.Process.Pid) - before
				t.Logf("%d wake-ups in a second", n)
				return n <= 2
			})
		})
	}
}
