package main

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/bench"
	"github.com/vhostd/vhostd/internal/placement"
	"github.com/vhostd/vhostd/internal/require"
)

// golden compares with a file of testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	want, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s: -want +got\n%s", name, diff)
	}
}

// shape lists the keys of a JSON value and the kinds of what they hold, of arrays the first element; the keys of those in loose are those of a map
// with keys that differ from run to run.
func shape(v any, at string, loose []string) (all []string) {
	switch v := v.(type) {
	case map[string]interface{}:
		for key, value := range v {
			if slices.Contains(loose, at) {
				key = "*"
			}
			all = append(all, shape(value, at+"."+key, loose)...)
		}
		slices.Sort(all)
		return slices.Compact(all)
	case []interface{}:
		if len(v) == 0 {
			return []string{at + "[] empty"}
		}
		return shape(v[0], at+"[]", loose)
	case string:
		return []string{at + " string"}
	case float64:
		return []string{at + " number"}
	case bool:
		return []string{at + " bool"}
	}
	return []string{at + " null"}
}

// TestBench runs vhostd bench against vhostd run, and checks the shape of what it prints.
func TestBench(t *testing.T) {
	path := socketIn(t)
	start(t, "--socket-path", path, "--net", "null,echo=on")
	args := []string{"bench", "--socket-path", path, "--direction", "echo", "--verify", "--ring", "packed", "--frame", "64,1518", "--cold", "1M",
		"--duration", "300ms", "--warm-up", "20ms"}
	got := command(t, append(args, "--json")...)
	var v any
	if err := json.Unmarshal([]byte(got.stdout), &v); err != nil || got.code != 0 || got.stderr != "" {
		t.Fatalf("%v: %+v", err, got)
	}
	// A second is in a class, or it was disturbed.
	var lines []string
	for _, line := range shape(v, "", []string{".classes"}) {
		line = strings.Replace(line, ".disturbed.", ".classes.*.", 1)
		if line != ".classes empty" {
			lines = append(lines, line)
		}
	}
	golden(t, "bench.json.txt", strings.Join(lines, "\n")+"\n")
	got = command(t, args...)
	for _, want := range []string{"echo, packed rings of 256, frames of 64, 1518 bytes, 1 under way", "PLACEMENT", "round trip of a frame", "all contents as sent"} {
		if got.code != 0 || !strings.Contains(got.stdout, want) || got.stderr != "" {
			t.Errorf("no %q in %+v", want, got)
		}
	}
}

// TestBenchOnTerminal: a line shows how it goes, and is gone at the end.
func TestBenchOnTerminal(t *testing.T) {
	path := socketIn(t)
	start(t, "--socket-path", path, "--net", "null")
	master, slave := openTerminal(t)
	cmd := exec.Command(binary, "bench", "--socket-path", path, "--duration", "300ms", "--warm-up", "1ms")
	var out buffer
	cmd.Stdout, cmd.Stderr = &out, slave
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	slave.Close()
	shown := make([]byte, 4096)
	n, err := master.Read(shown)
	if line := string(shown[:n]); err != nil || !strings.Contains(line, "1/1  ") || !strings.Contains(line, "to the host ") || !strings.HasSuffix(line, "\r\x1b[K") {
		t.Errorf("%v, %q", err, line)
	}
	if !strings.Contains(out.String(), "from available to used") {
		t.Error(out.String())
	}
}

// openTerminal makes a pseudo terminal.
func openTerminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		require.Skip(t, "terminal", "this machine has no /dev/ptmx")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { slave.Close() })
	return master, slave
}

// TestPrintBench: the tables of a run.
func TestPrintBench(t *testing.T) {
	us := func(n ...time.Duration) *bench.Latency {
		return &bench.Latency{Count: uint64(n[0]), Min: n[1], P50: 1200 * n[2], P90: n[3], P99: n[4], P999: n[5], Max: n[6]}
	}
	r := &bench.Result{
		Features: []string{"MRG_RXBUF", "VERSION_1"}, PID: 77,
		Classes: map[placement.Class]*bench.Rates{
			placement.Far:  {Seconds: 2, GuestToHost: bench.Rate{Frames: 5.2e6, Bits: 2.6e9}, BackendCPU: 1, Latency: us(3, 100, 2, 3000, 4321987, 5, 6)},
			placement.Near: {Seconds: 12, GuestToHost: bench.Rate{Frames: 26.714e6, Bits: 13.7e9}, HostToGuest: bench.Rate{Frames: 999, Bits: 1000}, BackendCPU: 0.123},
		},
		Disturbed:   &bench.Rates{Seconds: 1},
		GuestToHost: bench.Count{Frames: 300}, HostToGuest: bench.Count{Frames: 2}, Kicks: 1, Lost: 4, Foreign: 5, Behind: true, Interrupted: true,
	}
	for name, change := range map[string]func(*bench.Config){
		"bench.txt": func(*bench.Config) {},
		"bench-echo.txt": func(c *bench.Config) {
			c.Direction, c.Window, c.Think, c.Verify, c.Packed = bench.Echo, 1, time.Millisecond, true, true
		},
		"bench-rate.txt": func(c *bench.Config) { c.Direction, c.Rate = bench.Both, 1e5 },
		"bench-in.txt":   func(c *bench.Config) { c.Direction, c.Frames = bench.HostToGuest, []int{60, 1514} },
	} {
		c := bench.DefaultConfig()
		change(&c)
		var b strings.Builder
		if err := printBench(&b, c, r); err != nil {
			t.Fatal(err)
		}
		golden(t, name, b.String())
	}
}

func TestProgressLine(t *testing.T) {
	s := bench.Second{Class: placement.Near, Length: time.Second / 2, GuestToHost: bench.Count{Frames: 1e6, Bytes: 64e6},
		HostToGuest: bench.Count{Frames: 5, Bytes: 500}, Latency: &bench.Latency{P50: 1234, P99: 56789}}
	for direction, want := range map[bench.Direction]string{
		bench.GuestToHost: "3/10  near  to the host 2.0Mframe/s 1.0Gbit/s  p50 1.23µs p99 56.8µs  disturbed",
		bench.HostToGuest: "3/10  near  to the guest 10frame/s 8.0kbit/s  p50 1.23µs p99 56.8µs  disturbed",
		bench.Echo:        "3/10  near  to the host 2.0Mframe/s 1.0Gbit/s  to the guest 10frame/s 8.0kbit/s  p50 1.23µs p99 56.8µs  disturbed",
	} {
		if got := progressLine(bench.Config{Direction: direction}, 3, 10, s); got != want {
			t.Errorf("%s:\n%s, want\n%s", direction, got, want)
		}
	}
}

func TestParseBytes(t *testing.T) {
	for s, want := range map[string]int{"": 0, "0": 0, "17": 17, "4K": 4096, "256M": 256 << 20, "64G": 64 << 30} {
		if n, err := parseBytes(s); err != nil || n != want {
			t.Errorf("%q: %d, %v, want %d", s, n, err, want)
		}
	}
	for _, s := range []string{"-1", "K", "1.5G", "65G", "9999999999999999999", "1T"} {
		if _, err := parseBytes(s); err == nil {
			t.Errorf("%q is accepted", s)
		}
	}
}
