package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/config"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/virtio"
)

// switchHead is head for ports that are at a switch.
var switchHead = strings.Replace(head, `net = "null,echo=on"`, `switch = "lan"`, 1)

// writeSwitch makes a new configuration whose ports are at the switch lan.
func (m *many) writeSwitch(t *testing.T, text string) {
	t.Helper()
	if err := os.WriteFile(m.file(), []byte(strings.ReplaceAll(switchHead+text, "DIR", m.dir)), 0o600); err != nil {
		t.Fatal(err)
	}
}

func startSwitch(t *testing.T, text string) *many {
	t.Helper()
	m := &many{dir: vhosttest.ShortDir(t)}
	m.writeSwitch(t, text)
	m.process = launch(t, exec.Command(binary, "serve", "--config", m.file()))
	return m
}

// ethernet is a frame of Ethernet with a number in it, from a station's address, whose last byte is src, to another's or (0xff) all.
func ethernet(src, dst byte, n uint64) []byte {
	f := vhosttest.Frame(n, 100)
	copy(f, []byte{0x52, 0x54, 0, 0, 0, dst, 0x52, 0x54, 0, 0, 0, src})
	if dst == 0xff {
		copy(f, "\xff\xff\xff\xff\xff\xff")
	}
	return f
}

func send(t *testing.T, g *vhosttest.Guest, f []byte) {
	t.Helper()
	if err := g.Send(0, virtio.NetHdr{}, f, nil); err != nil {
		t.Fatal(err)
	}
	if err := g.Transmitq(0).Settle(); err != nil {
		t.Fatal(err)
	}
}

// gets checks which frame is the next that comes.
func gets(t *testing.T, g *vhosttest.Guest, want []byte) {
	t.Helper()
	if _, got, err := g.Recv(0, patience); err != nil || string(got) != string(want) {
		t.Fatalf("got %x, %v, want %x", got, err, want)
	}
}

func (m *many) guest(t *testing.T, port string) *vhosttest.Guest {
	t.Helper()
	return vhosttest.Start(t, nil, vhosttest.Options{Path: m.socket(port)})
}

// switchStats asks for one switch.
func (m *many) switchStats(t *testing.T, name string) switchReport {
	t.Helper()
	got := command(t, "stats", "--config", m.file(), "--switch", name, "--json")
	var a answer
	if err := json.Unmarshal([]byte(got.stdout), &a); err != nil || a.Switch == nil {
		t.Fatalf("%v in %+v", err, got)
	}
	return *a.Switch
}

// TestServeSwitch: guests on a switch talk to each other, its rules are those of the file, and its counters are told.
func TestServeSwitch(t *testing.T) {
	m := startSwitch(t, "[switch.lan]\nmtu = 1500\n[metrics]\n[port.a]\n[port.b]\nguard.mac = [\"52:54:00:00:00:0b\"]\n[port.c]\nvlan.access = 7\n")
	a, b, c := m.guest(t, "a"), m.guest(t, "b"), m.guest(t, "c")
	send(t, a, ethernet(0xa, 0xff, 1))
	gets(t, b, ethernet(0xa, 0xff, 1))
	send(t, b, ethernet(0xb, 0xa, 2))
	gets(t, a, ethernet(0xb, 0xa, 2))
	send(t, b, ethernet(0xd, 0xa, 3)) // an address that is not its own
	send(t, b, ethernet(0xb, 0xa, 4))
	gets(t, a, ethernet(0xb, 0xa, 4))
	if _, f, err := c.Recv(0, 0); err == nil {
		t.Errorf("a port of another VLAN got %x", f)
	}
	sw := m.switchStats(t, "lan")
	if sw.Addresses != 2 || len(sw.Ports) != 3 || sw.Ports[1].Drops["mac"] != 1 || len(sw.Learned) != 2 ||
		sw.Learned[0].Port != "a" || sw.Learned[0].MAC != "52:54:00:00:00:0a" || sw.Learned[0].VLAN != 1 {
		t.Errorf("%+v", sw)
	}
	if p := m.stats(t)["b"]; p.Switch != "lan" || p.Switched == nil || p.Switched.Drops["mac"] != 1 || p.dropped() != 1 {
		t.Errorf("%+v", p)
	}
	table := command(t, "stats", "--config", m.file()).stdout
	for _, want := range []string{"switch lan: 3 ports, 2 of 8192 addresses learned", "   b              mac       1"} {
		if !strings.Contains(table, want) {
			t.Errorf("no %q in\n%s", want, table)
		}
	}
	one := command(t, "stats", "--config", m.file(), "--switch", "lan").stdout
	for _, want := range []string{"52:54:00:00:00:0b", "mac 1"} {
		if !strings.Contains(one, want) {
			t.Errorf("no %q in\n%s", want, one)
		}
	}
	if got := command(t, "stats", "--config", m.file(), "--switch", "lam"); !strings.Contains(got.stderr, `there is no switch "lam"`) {
		t.Errorf("%+v", got)
	}
}

// TestServeSwitchMetrics: the drops of a port of a switch, by reason.
func TestServeSwitchMetrics(t *testing.T) {
	m := startSwitch(t, "[metrics]\nlisten = \"127.0.0.1:0\"\n[switch.lan]\n[port.a]\nisolated = true\n[port.b]\nisolated = true\n")
	a := m.guest(t, "a")
	send(t, m.guest(t, "b"), ethernet(0xb, 0xff, 1))
	send(t, a, ethernet(0xa, 0xb, 1))
	code, text := get(t, metricsURL(t, m.process)+"/metrics")
	for _, want := range []string{
		`vhostd_switch_open{switch="lan"} 1`, `vhostd_switch_addresses{switch="lan"} 2`, `vhostd_switch_port_addresses{port="a",switch="lan"} 1`,
		`vhostd_switch_port_dropped_total{port="a",reason="isolated",switch="lan"} 1`,
	} {
		if code != http.StatusOK || !strings.Contains(text, "\n"+want) {
			t.Errorf("no %s in the metrics", want)
		}
	}
}

// TestReloadSwitch: rules change while frames flow, an address moves from one port to another, and a switch that changes takes its ports with it.
func TestReloadSwitch(t *testing.T) {
	const two = "[switch.lan]\n[switch.other]\n[port.a]\n[port.b]\n"
	m := startSwitch(t, two+"guard.mac = [\"52:54:00:00:00:0b\"]\n[port.c]\nswitch = \"other\"\n")
	a, b := m.guest(t, "a"), m.guest(t, "b")
	c := m.guest(t, "c")
	send(t, b, ethernet(0xb, 0xff, 1))
	gets(t, a, ethernet(0xb, 0xff, 1))
	m.writeSwitch(t, strings.Replace(two, "[port.a]\n", "[port.a]\nguard.mac = [\"52:54:00:00:00:0b\"]\n", 1)+"[port.c]\nswitch = \"other\"\n")
	r, got := m.reload(t)
	if got.code != exitOK || len(r.Steps) != 2 || r.Steps[0].Action != config.Change || r.Steps[1].Action != config.Change || r.Unchanged != 3 {
		t.Fatalf("%+v", got)
	}
	send(t, a, ethernet(0xb, 0xff, 2)) // now its own
	gets(t, b, ethernet(0xb, 0xff, 2))
	m.writeSwitch(t, strings.Replace(two, "[switch.lan]\n", "[switch.lan]\nmax-addresses = 100\n", 1)+"[port.c]\nswitch = \"other\"\n")
	if r, got = m.reload(t); got.code != exitOK || len(r.Steps) != 3 || r.Unchanged != 2 {
		t.Fatalf("%+v", got)
	}
	if _, err := a.FE.GetFeatures(); err == nil {
		t.Error("the switch was opened anew, and a front-end at it not disconnected")
	}
	if _, err := c.FE.GetFeatures(); err != nil {
		t.Errorf("a port of another switch was opened anew: %v", err)
	}
	a.Reconnect()
	b.Reconnect()
	send(t, a, ethernet(0xa, 0xff, 3))
	gets(t, b, ethernet(0xa, 0xff, 3))
	if st := m.stats(t); st["c"].Sessions != 1 || m.switchStats(t, "lan").MaxAddresses != 100 {
		t.Errorf("%+v", st)
	}
}

// TestReloadSwitchUnderTraffic: a hundred reloads that bring, change and take ports of a switch, one of them with a guest, while two guests talk whose ports stay as
// they are. They lose no frame, and nobody else gets one, since their addresses are not forgotten.
func TestReloadSwitchUnderTraffic(t *testing.T) {
	const stay = "[switch.lan]\n[port.a]\n[port.b]\nguard.no-router = true\n"
	m := startSwitch(t, stay+"[port.other]\n")
	a, b, other := m.guest(t, "a"), m.guest(t, "b"), m.guest(t, "other")
	send(t, b, ethernet(0xb, 0xff, 0))
	gets(t, a, ethernet(0xb, 0xff, 0))
	gets(t, other, ethernet(0xb, 0xff, 0))
	stop, ended := make(chan struct{}), make(chan error)
	var sent uint64
	go func() { ended <- converse(a, b, stop, &sent) }()
	for i := range 100 {
		m.writeSwitch(t, fmt.Sprintf("%s[port.other]\nvlan.access = %d\nguard.mac = [\"52:54:00:00:01:%02x\"]\n[port.new%d]\n", stay, 1+i%3, i, i))
		if r, got := m.reload(t); got.code != exitOK || r.Unchanged != 3 {
			t.Fatalf("reload %d: %+v", i, got)
		}
	}
	close(stop)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	for _, p := range m.switchStats(t, "lan").Ports {
		if p.Flooded > 1 || p.Name != "b" && p.Flooded > 0 || len(p.Drops) > 0 {
			t.Errorf("%+v", p)
		}
	}
	if _, f, err := other.Recv(0, 0); err == nil {
		t.Errorf("the third guest got %x", f)
	}
	if st := m.stats(t); st["a"].Sessions != 1 || st["b"].Sessions != 1 || st["other"].Sessions != 1 || sent == 0 {
		t.Errorf("%+v, %d frames", st, sent)
	}
	t.Logf("%d frames", sent)
}

// converse has a send numbered frames to b until stop, a few at a time, each of which has to arrive in its place.
func converse(a, b *vhosttest.Guest, stop <-chan struct{}, sent *uint64) error {
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		const few = 16
		for i := range uint64(few) {
			if err := a.Send(0, virtio.NetHdr{}, ethernet(0xa, 0xb, *sent+i), nil); err != nil {
				return err
			}
		}
		for range few {
			if _, f, err := b.Recv(0, patience); err != nil || string(f) != string(ethernet(0xa, 0xb, *sent)) {
				return fmt.Errorf("frame %d came as %x: %w", *sent, f, err)
			}
			*sent++
		}
	}
}

// TestServeUplinks: two switches are joined by a cable of two uplinks; one of them goes and comes back.
func TestServeUplinks(t *testing.T) {
	cable := func(n int) string {
		return fmt.Sprintf("[uplink.there]\nswitch = \"lan\"\nnet = \"dgram:local=127.0.0.1:%d,remote=127.0.0.1:%d\"\n", n, n+1)
	}
	const port = 17651
	text := "[switch.lan]\n[switch.far]\n[port.a]\n[port.b]\nswitch = \"far\"\n" +
		fmt.Sprintf("[uplink.here]\nswitch = \"far\"\nnet = \"dgram:local=127.0.0.1:%d,remote=127.0.0.1:%d\"\n", port+1, port)
	m := startSwitch(t, text+cable(port))
	a, b := m.guest(t, "a"), m.guest(t, "b")
	crosses := func(n uint64) {
		t.Helper()
		send(t, a, ethernet(0xa, 0xff, n))
		gets(t, b, ethernet(0xa, 0xff, n))
		send(t, b, ethernet(0xb, 0xa, n))
		gets(t, a, ethernet(0xb, 0xa, n))
	}
	crosses(1)
	m.writeSwitch(t, text)
	if r, got := m.reload(t); got.code != exitOK || len(r.Steps) != 1 || r.Steps[0].Kind != config.KindUplink {
		t.Fatalf("%+v", got)
	}
	send(t, a, ethernet(0xa, 0xff, 2))
	time.Sleep(20 * time.Millisecond) // it would have come
	if _, f, err := b.Recv(0, 0); err == nil {
		t.Errorf("%x came without a cable", f)
	}
	m.writeSwitch(t, text+cable(port+1)) // where the other end is
	if r, got := m.reload(t); got.code != exitFailure || r.Failed != 1 || !strings.Contains(r.Steps[0].Error, "address already in use") {
		t.Fatalf("%+v", got)
	}
	if table := command(t, "stats", "--config", m.file()).stdout; !strings.Contains(table, "uplink there is not there: ") {
		t.Errorf("no reason in\n%s", table)
	}
	m.writeSwitch(t, text+cable(port))
	if r, got := m.reload(t); got.code != exitOK || len(r.Steps) != 1 || r.Steps[0].Action != config.Add {
		t.Fatalf("%+v", got)
	}
	crosses(3)
}

// TestReloadBeyondTheSandbox: what needs more rights than were kept is refused before anything is closed for it, what needs no more is done, and
// [sandbox] keep keeps more.
func TestReloadBeyondTheSandbox(t *testing.T) {
	m := startMany(t, ports(1))
	e := newEchoes(t, m.socket("vm0"))
	const udp = "net = \"dgram:local=127.0.0.1:17661,remote=127.0.0.1:17662\"\n"
	m.write(t, "[port.vm0]\n"+udp+"[port.vm1]\n[port.vm2]\n"+udp+"[port.vm3]\nsocket-path = \"/run/vm3.sock\"\n[sandbox]\nkeep = [\"dgram\"]\n")
	r, got := m.reload(t)
	if got.code != exitFailure || r.Failed != 3 || len(r.Steps) != 4 || strings.Join(r.Restart, "") != "sandbox.keep" {
		t.Fatalf("%+v", got)
	}
	for _, s := range r.Steps {
		if refused := strings.HasPrefix(s.Error, "needs a restart: "); refused == (s.Name == "vm1") {
			t.Errorf("%+v", s)
		}
	}
	if err := e.round(5); err != nil || r.Steps[0].Name != "vm0" || r.Steps[0].Stands != "it goes on as before" {
		t.Errorf("%v, %+v", err, r.Steps[0])
	}
	if m.end(syscall.SIGTERM) != exitOK {
		t.Error("it did not end cleanly")
	}
	m.write(t, ports(1)+"[sandbox]\nkeep = [\"dgram\"]\n")
	m.process = launch(t, exec.Command(binary, "serve", "--config", m.file()))
	m.change(t, ports(1)+"[port.vm2]\n"+udp+"[sandbox]\nkeep = [\"dgram\"]\n")
	if st := m.stats(t)["vm2"]; st.State != waiting {
		t.Errorf("%+v", st)
	}
}

// TestServeConfined looks at a daemon from outside: it has no capability that its ports do not need, and a filter on all of its threads.
func TestServeConfined(t *testing.T) {
	m := startMany(t, ports(2))
	if err := newEchoes(t, m.socket("vm0")).round(5); err != nil {
		t.Fatal(err)
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", m.cmd.Process.Pid))
	if err != nil || len(tasks) < 4 {
		t.Fatalf("%v, %v", tasks, err)
	}
	for _, task := range tasks {
		b, err := os.ReadFile(task)
		if err != nil {
			continue // it has ended
		}
		for _, want := range []string{"CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
			if !strings.Contains(string(b), want) {
				t.Errorf("no %q in %s", want, task)
			}
		}
	}
	m.end(syscall.SIGTERM)
	m.write(t, ports(1)+"[sandbox]\nenabled = false\nuser = \"root\"\nkeep = [\"sing\"]\n")
	got := command(t, "check", "--config", m.file())
	for _, want := range []string{`sandbox.user: is part of the sandbox, which is not enabled`, `sandbox.keep: element 1: unknown kind "sing"`} {
		if !strings.Contains(got.stderr, want) {
			t.Errorf("no %s in %+v", want, got)
		}
	}
}

// TestSwitchTakesBounds: what the file may say, a switch takes.
func TestSwitchTakesBounds(t *testing.T) {
	f := &fleet{log: slog.New(slog.DiscardHandler)}
	for _, text := range []string{
		"max-addresses = 16\nageing = \"1s\"\nmtu = 68\nhold = \"1us\"\nbacklog = 1\nbacklog-bytes = 131072\n",
		"max-addresses = 1048576\nageing = \"24h\"\nmtu = 65535\nhold = \"1s\"\nbacklog = 32768\nbacklog-bytes = 1073741824\n",
	} {
		file := config.Parse("f", []byte("[switch.lan]\n"+text))
		if err := file.Err(); err != nil {
			t.Fatal(err)
		}
		p := f.openSwitch(file.Switches["lan"])
		if err := errors.Join(p.err(), p.stop()); err != nil {
			t.Error(err)
		}
	}
}
