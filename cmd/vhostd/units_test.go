package main

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/virtio"
)

func TestParseFeatures(t *testing.T) {
	parseFeatures := func(list string) (virtio.Features, error) {
		s := settings{flags: flags{disable: list}}
		err := s.parseFeatures()
		return s.disable, err
	}
	for list, want := range map[string]virtio.Features{
		"":                                   0,
		"MRG_RXBUF":                          virtio.FNetMrgRxbuf,
		"mrg_rxbuf, event_idx,":              virtio.FNetMrgRxbuf | virtio.FEventIdx,
		"VIRTIO_NET_F_MQ,VIRTIO_F_VERSION_1": virtio.FNetMQ | virtio.FVersion1,
		"VIRTIO_RING_F_INDIRECT_DESC":        virtio.FIndirectDesc,
	} {
		if got, err := parseFeatures(list); err != nil || got != want {
			t.Errorf("%q: %v (%v), want %v", list, got, err, want)
		}
	}
	// Every feature that can be offered can be left out, by the name that vhostd prints.
	for name, f := range offerable() {
		if got, err := parseFeatures(f.String()); err != nil || got != f {
			t.Errorf("%s: %v (%v)", name, got, err)
		}
	}
}

func TestQEMUCommand(t *testing.T) {
	s := settings{mac: [6]byte{0x52, 0x54, 0, 1, 2, 3}, flags: flags{mtu: 9000}}
	got := qemuCommand(s, "/run/a b,c'd.sock", 2)
	for _, want := range []string{
		`-chardev 'socket,id=vhostd0,path=/run/a b,,c'\''d.sock,reconnect=1'`,
		`-object memory-backend-memfd,id=mem,size=1G,share=on`,
		`-netdev vhost-user,id=net0,chardev=vhostd0,queues=2`,
		`,mq=on,vectors=6,mac=52:54:00:01:02:03,host_mtu=9000 `,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %s in:\n%s", want, got)
		}
	}
	s.client = true
	if got := qemuCommand(s, "/run/vm.sock", 1); !strings.Contains(got, "path=/run/vm.sock,server=on ") || strings.Contains(got, "mq=on") {
		t.Errorf("for a QEMU that listens:\n%s", got)
	}
}

func TestScaled(t *testing.T) {
	for n, want := range map[uint64]string{0: "0B", 1023: "1023B", 1024: "1.0KiB", 1536 << 20: "1.5GiB", 1<<64 - 1: "16.0EiB"} {
		if got := bytesOf(n); got != want {
			t.Errorf("bytesOf(%d) = %s, want %s", n, got, want)
		}
	}
	for v, want := range map[float64]string{0: "0", 999: "999", 1000: "1.0k", 2.5e9: "2.5G"} {
		if got := decimal(v); got != want {
			t.Errorf("decimal(%v) = %s, want %s", v, got, want)
		}
	}
}

func TestRates(t *testing.T) {
	at := func(pid int, seconds float64, frames, bytes uint64) report {
		return report{Daemon: daemonInfo{PID: pid, UptimeSeconds: seconds},
			Stats: backend.Stats{Queues: []backend.QueueStats{{Frames: frames, Bytes: bytes}}}}
	}
	before := at(1, 10, 100, 1000)
	for name, c := range map[string]struct {
		before       *report
		now          report
		frames, bits string
	}{
		"first look":     {nil, before, "-", "-"},
		"two seconds":    {&before, at(1, 12, 4100, 251000), "2.0k", "1.0M"},
		"quiet":          {&before, at(1, 11, 100, 1000), "0", "0"},
		"another daemon": {&before, at(2, 12, 200, 2000), "-", "-"},
		"no time passed": {&before, at(1, 10, 200, 2000), "-", "-"},
	} {
		if f, b := rates(c.now, c.before, 0); f != c.frames || b != c.bits {
			t.Errorf("%s: %s, %s, want %s, %s", name, f, b, c.frames, c.bits)
		}
	}
}

// TestPrintReport shows a queue in trouble.
func TestPrintReport(t *testing.T) {
	r := report{
		Daemon: daemonInfo{Version: "v1", PID: 7, Net: "tap:vnet0", UptimeSeconds: 61},
		Stats: backend.Stats{
			Connected: true, Sessions: 2, GuestErrors: 1, MemoryRegions: 1, MemoryBytes: 1 << 30, Features: []string{"VERSION_1"},
			Device: backend.DeviceStats{Kind: "tap", Name: "vnet0", MTU: 1500, Pairs: 1, ZeroCopy: "never"},
			Queues: []backend.QueueStats{
				{Index: 0, Direction: "ToGuest", Size: 256, Started: true},
				{Index: 1, Direction: fromGuest, Size: 256, Started: true, Enabled: true, Broken: "head 300, queue size 256",
					Frames: 5, Outcomes: map[string]uint64{"zerocopied": 3, "copied_small": 2}, Pending: 1, MaxPending: 4, MaxWaitNs: 1500},
			},
		},
	}
	var b strings.Builder
	if err := printReport(&b, r, nil); err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile("testdata/report.txt")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), b.String()); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

// TestLandlockMeaning: of what a version has, nothing is said to be missing.
func TestLandlockMeaning(t *testing.T) {
	for version, want := range map[int][2]string{1: {"truncation", "abstract"}, 3: {"6.7", "version 9"}, 6: {"version 9", "6.7"}, 8: {"version 9", "abstract"}, 9: {"opens no files", "version"}} {
		if got := landlockMeaning(version); !strings.Contains(got, want[0]) || strings.Contains(got, want[1]) {
			t.Errorf("version %d: %q, want %q in it and not %q", version, got, want[0], want[1])
		}
	}
}

func TestDoctor(t *testing.T) {
	text := command(t, "doctor")
	asJSON := command(t, "doctor", "--json")
	var c checkup
	if err := json.Unmarshal([]byte(asJSON.stdout), &c); err != nil {
		t.Fatalf("%v: %+v", err, asJSON)
	}
	if want := map[bool]int{true: exitOK, false: exitFailure}[c.OK]; text.code != want || asJSON.code != want {
		t.Errorf("codes %d and %d, want %d", text.code, asJSON.code, want)
	}
	seen := map[string]bool{}
	for _, f := range c.Findings {
		seen[f.What] = true
		if f.Detail == "" || f.Verdict != verdictOK && f.Verdict != verdictWarn && f.Verdict != verdictFail {
			t.Errorf("%+v says nothing", f)
		}
		if f.Verdict != verdictOK && f.Fix == "" {
			t.Errorf("%+v does not say what to do", f)
		}
		if !strings.Contains(text.stdout, string(f.Verdict)+strings.Repeat(" ", 6-len(f.Verdict))+f.What+": ") {
			t.Errorf("%s is not in the text:\n%s", f.What, text.stdout)
		}
	}
	for _, want := range []string{
		"kernel", "memfd", "open files", "QEMU", "KVM", "pings for --net user", "--net tap: CAP_NET_ADMIN", "--net tap: /dev/net/tun",
		"locked memory", "huge pages", "io_uring", "MSG_ZEROCOPY", "--net xdp: AF_XDP sockets", "--net xdp: XDP programs",
	} {
		if !seen[want] {
			t.Errorf("%s was not looked at", want)
		}
	}
}

func TestVersionOf(t *testing.T) {
	for s, want := range map[string][2]int{
		"6.1.0-49-cloud-amd64": {6, 1}, "QEMU emulator version 7.2.22 (Debian 1:7.2)": {7, 2}, "none": {0, 0},
	} {
		if major, minor := versionOf(s); [2]int{major, minor} != want {
			t.Errorf("%q: %d.%d, want %v", s, major, minor, want)
		}
	}
	if !atLeast(6, 0, 5, 4) || !atLeast(5, 4, 5, 4) || atLeast(5, 3, 5, 4) || atLeast(4, 9, 5, 4) {
		t.Error("atLeast compares wrongly")
	}
}
