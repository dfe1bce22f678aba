package config

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// parse reads a text that has to be right.
func parse(t *testing.T, text string) Config {
	t.Helper()
	f := Parse("vhostd.toml", []byte(text))
	if err := f.Err(); err != nil {
		t.Fatal(err)
	}
	return f.Config
}

func TestParse(t *testing.T) {
	got := parse(t, `
[log]
level = "debug"

[control]
socket = "none"

[metrics]
listen = "127.0.0.1:9100"
pprof = true

[defaults]
socket-path = "/run/vhostd/{port}.sock"
socket-group = "kvm"
queues = 2
disable-features = ["MRG_RXBUF"]

[port.vm1]
net = "tap:v-{port},bridge=br0"

[port]
vm2 = { net = "null", queues = 4, mac = "52:54:00:00:00:01", mtu = 9000, poll = "5us", disable-features = [], socket-path = "/a", client = true }

[port.vm-3]
net = "user"
hostfwd = ["tcp::2222-:22", "udp::53-:53"]
zerocopy = "off"
no-balloon = true
socket-mode = "0600"
`)
	dflt := Port{SocketGroup: "kvm", Queues: 2, ZeroCopy: "auto", Poll: PollDefault, Disable: []string{"MRG_RXBUF"}}
	vm1, vm2, vm3 := dflt, dflt, dflt
	vm1.Name, vm1.SocketPath, vm1.Net = "vm1", "/run/vhostd/vm1.sock", "tap:v-vm1,bridge=br0"
	vm2 = Port{Name: "vm2", SocketPath: "/a", SocketGroup: "kvm", Net: "null", Queues: 4, MAC: "52:54:00:00:00:01", MTU: 9000,
		Poll: 5 * time.Microsecond, ZeroCopy: "auto", Disable: []string{}, Client: true}
	vm3.Name, vm3.SocketPath, vm3.Net, vm3.Hostfwd = "vm-3", "/run/vhostd/vm-3.sock", "user", []string{"tcp::2222-:22", "udp::53-:53"}
	vm3.ZeroCopy, vm3.NoBalloon, vm3.SocketMode = "off", true, "0600"
	dflt.SocketPath = "/run/vhostd/{port}.sock"
	want := Config{
		Defaults: dflt,
		Log:      Log{Format: "text", Level: "debug"}, Control: Control{Socket: "none"}, Metrics: Metrics{Listen: "127.0.0.1:9100", Profiles: true},
		Sandbox:  Sandbox{Enabled: true},
		Switches: map[string]Switch{}, Uplinks: map[string]Uplink{}, Ports: map[string]Port{"vm1": vm1, "vm2": vm2, "vm-3": vm3},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

// TestEmpty: a file that says nothing is a daemon without ports, and one that can be told to have some.
func TestEmpty(t *testing.T) {
	if c := parse(t, ""); len(c.Ports) != 0 || c.Control.Socket != "/run/vhostd/vhostd.ctl" || c.Log != (Log{"text", "info"}) {
		t.Errorf("%+v", c)
	}
}

// good is what stands before the line that each case of TestProblems is about: that is line 4.
const good = "[port.vm1]\nnet = \"null\"\nsocket-path = \"/run/vm1.sock\"\n"

// at is the same for a port that is to be at a switch.
const at = "[switch.lan]\n[port.vm1]\nsocket-path = \"/run/vm1.sock\"\n"

// TestProblems has every kind of mistake, and the line that it is told with.
func TestProblems(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{good + `mtuu = 1500`, `4: port.vm1.mtuu: unknown key: did you mean mtu?`},
		{good + `socket = "/a"`, `4: port.vm1.socket: unknown key: did you mean socket-path?`},
		{good + `balloon = true`, `4: port.vm1.balloon: unknown key: did you mean no-balloon?`},
		{good + `colour = "red"`, `4: port.vm1.colour: unknown key: known are socket-path, client, `},
		{good + `mtu = 67`, `4: port.vm1.mtu: want a number from 68 to 65535, not 67`},
		{good + `mtu = 65536`, `4: port.vm1.mtu: want a number from 68 to 65535, not 65536`},
		{good + `mtu = "1500"`, `4: port.vm1.mtu: want a number from 68 to 65535, not the string "1500"`},
		{good + `mtu = 1500.0`, `4: port.vm1.mtu: want a number from 68 to 65535, not the fraction 1500`},
		{good + `mtu = {}`, `4: port.vm1.mtu: want a number from 68 to 65535, not a table`},
		{good + `queues = 0`, `4: port.vm1.queues: want a number from 1 to 128, not 0`},
		{good + `queues = 129`, `4: port.vm1.queues: want a number from 1 to 128, not 129`},
		{good + `client = "yes"`, `4: port.vm1.client: want true or false, not the string "yes"`},
		{good + `client = 1979-05-27`, `4: port.vm1.client: want true or false, not a date or time`},
		{good + `poll = 30`, `4: port.vm1.poll: want a string with a duration from 0s to 1s, not the number 30`},
		{good + `poll = "30"`, `4: port.vm1.poll: want a duration from 0s to 1s, not "30"`},
		{good + `poll = "-1us"`, `4: port.vm1.poll: want a duration from 0s to 1s, not "-1us"`},
		{good + `zerocopy = "maybe"`, `4: port.vm1.zerocopy: want auto or on or off, not "maybe"`},
		{good + `mac = true`, `4: port.vm1.mac: want a string, an address like 52:54:00:12:34:56, not true`},
		{good + `mac = ""`, `4: port.vm1.mac: is empty: leave it out, or say what you want`},
		{good + `hostfwd = "tcp::1-:1"`, `4: port.vm1.hostfwd: want a list, [ forwards as --hostfwd has them ], not the string "tcp::1-:1"`},
		{good + `hostfwd = ["a", []]`, `4: port.vm1.hostfwd: element 2: want a string, forwards as --hostfwd has them, not a list`},
		{good + `"a b" = 1`, `4: port.vm1.a b: unknown key`},
		{good + `x.y = 1`, `4: port.vm1.x: unknown key`},
		{good + `net = "null"`, `4: toml: `},
		{good + `mtu 1500`, `4: toml: `},
		{good + "\n[port.vm1]", `5: toml: `},
		{good + "[prot.vm2]", `4: prot: unknown table: did you mean port?`},
		{good + "[[log]]", `4: log: want a table, [log]`},
		{good + "[log]\nlevel = \"loud\"", `5: log.level: want debug or info or warn or error, not "loud"`},
		{good + "[log]\nformat = \"xml\"", `5: log.format: want text or json, not "xml"`},
		{good + "[control]\nsocket = 1", `5: control.socket: want a string, a path, not the number 1`},
		{good + "[control]\nsocket = \"/run/vm1.sock\"", `3: port.vm1.socket-path: /run/vm1.sock is control.socket's as well`},
		{good + "[defaults]\nmac = \"52:54:00:00:00:01\"", `5: defaults.mac: unknown key`},
		{good + "[defaults]\nmtu = 1", `5: defaults.mtu: want a number`},
		{good + `[port.vm2]`, `4: port.vm2: net or switch is missing: which network the guest is on`},
		{good + `[port.vm2]`, `4: port.vm2: socket-path is missing`},
		{good + "[port.vm2]\nnet = \"null\"\nsocket-path = \"/run/vm1.sock\"", `6: port.vm2.socket-path: /run/vm1.sock is port.vm1's as well`},
		{good + `[port."vm 2"]`, `4: port.vm 2: "vm 2" is no name: want 1 to 64 letters, digits, - and _`},
		{good + `[port.` + strings.Repeat("x", 65) + `]`, `4: port.` + strings.Repeat("x", 65) + `: "x`},
		{good + `switch = "lan"`, `4: port.vm1.switch: a port is on a network of its own (net) or at a switch, not both`},
		{good + `vlan.access = 10`, `4: port.vm1.vlan.access: is for ports of a switch, and this one has a network of its own`},
		{good + "[port.vm1.guard]\nip = [\"10.0.0.1\"]", `5: port.vm1.guard.ip: is for ports of a switch`},
		{good + `guard.mca = []`, `4: port.vm1.guard.mca: unknown key: did you mean guard.mac?`},
		{good + `vlan = 10`, `4: port.vm1.vlan: unknown key`},
		{good + "[defaults]\nnet = \"null\"\nswitch = \"a\"", `6: defaults.switch: is for ports that are at a switch, and net for the others: say one of them`},
		{"[metrics]\npprof = true", `2: metrics.pprof: needs listen: the address to serve on`},
		{at + `switch = "lam"`, `4: port.vm1.switch: there is no switch "lam": did you mean lan?`},
		{good + "[uplink.up]\nnet = \"null\"\nswitch = \"lan\"", `6: uplink.up.switch: there is no switch "lan", nor any other`},
		{at + "switch = \"lan\"\nhostfwd = [\"x\"]", `5: port.vm1.hostfwd: is for ports with a network of their own, and this one is at a switch`},
		{at + "switch = \"lan\"\nzerocopy = \"off\"", `5: port.vm1.zerocopy: is for ports with a network of their own, and this one is at a switch`},
		{at + "switch = \"lan\"\nvlan.access = 4095", `5: port.vm1.vlan.access: want a number from 1 to 4094, not 4095`},
		{at + "switch = \"lan\"\nvlan.trunk = [\"10-9\"]", `5: port.vm1.vlan.trunk: element 1: want a VLAN from 1 to 4094, or a range like 10-20, not "10-9"`},
		{at + "switch = \"lan\"\nvlan.trunk = [\"9\"]\nvlan.access = 3", `6: port.vm1.vlan.access: a port is either an access port or a trunk`},
		{at + "switch = \"lan\"\nguard.mac = [\"01:00:5e:00:00:01\"]", `5: port.vm1.guard.mac: element 1: want an address of one station`},
		{at + "switch = \"lan\"\nguard.mac = [\"00:00:00:00:00:00\"]", `5: port.vm1.guard.mac: element 1: all zero is no address`},
		{at + "switch = \"lan\"\nguard.ip = [\"10.0.0\"]", `5: port.vm1.guard.ip: element 1: want an address or a prefix, like "10.0.0.5" and "fd00::/64", not "10.0.0"`},
		{at + "switch = \"lan\"\nfrom-guest.frames = -1", `5: port.vm1.from-guest.frames: want 0 or more, not -1`},
		{at + "switch = \"lan\"\n[uplink.up]\n", `5: uplink.up: net is missing: which network the switch is joined to`},
		{at + "switch = \"lan\"\n[uplink.up]\n", `5: uplink.up: switch is missing: which one is joined to the network`},
		{at + "switch = \"lan\"\n[uplink.vm1]\nswitch = \"lan\"\nnet = \"null\"", `5: uplink.vm1: switch lan has a port of that name: choose another`},
		{at + "switch = \"lan\"\n[switch.b]\nageing = \"1ms\"", `6: switch.b.ageing: want a duration from 1s to 24h0m0s, not "1ms"`},
		{"[port]\nnet = \"null\"", `2: port.net: unknown key: what stands in [port] are tables, [port.NAME]`},
		{"port = 3", `1: port: want a table, [port]`},
		{"\n\nport.vm1 = { net = \"null\", socket-path = \"/a\",\n mtu = 3 }", `4: port.vm1.mtu: want a number`},
	} {
		err := Parse("vhostd.toml", []byte(c.text)).Err()
		if err == nil || !strings.Contains("\n"+err.Error(), "\nvhostd.toml:"+c.want) {
			t.Errorf("%s\n got %v\nwant %s", c.text, err, c.want)
		}
	}
}

// TestAllProblemsAtOnce: in the order of their lines, and no more than there are.
func TestAllProblemsAtOnce(t *testing.T) {
	f := Parse("f", []byte("[control]\nsockt = \"/a\"\n[port.b]\nmtu = 1\nnet = 2\nsocket-path = 3\n[port.a]\nqueue = 1\nnet = \"null\"\nsocket-path = \"/b\"\n"))
	f.Blame("port.a.net", errors.Join(errors.New("one"), errors.New("two")))
	f.Blame("port.a.mac", errors.New("does not stand there"))
	f.Blame("port.a.mac", nil)
	want := strings.Join([]string{
		"f:2: control.sockt: unknown key: did you mean socket?",
		"f:4: port.b.mtu: want a number from 68 to 65535, not 1",
		"f:5: port.b.net: want a string, a network as --net has it, not the number 2",
		"f:6: port.b.socket-path: want a string, a path, not the number 3",
		"f:7: port.a.mac: does not stand there",
		"f:8: port.a.queue: unknown key: did you mean queues?",
		"f:9: port.a.net: one",
		"f:9: port.a.net: two",
	}, "\n")
	if diff := cmp.Diff(want, f.Err().Error()); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	path := filepath.Join(dir, "f")
	if err := os.WriteFile(path, []byte(good), 0o600); err != nil {
		t.Fatal(err)
	}
	if f, err := Load(path); err != nil || f.Err() != nil || f.Ports["vm1"].Net != "null" {
		t.Errorf("%+v, %v", f, err)
	}
	if err := os.WriteFile(path, make([]byte, MaxFile+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path); err == nil || !strings.Contains(err.Error(), "more than 8388608 bytes") {
		t.Errorf("too large: %v", err)
	}
}

func TestCompare(t *testing.T) {
	old := parse(t, `
[port.gone]
net = "null"
socket-path = "/gone"
[port.stays]
net = "null"
socket-path = "/stays"
disable-features = []
[port.mode]
net = "null"
socket-path = "/mode"
[port.mtu]
net = "null"
socket-path = "/mtu"
socket-mode = "0600"
`)
	now := parse(t, `
[log]
level = "warn"
format = "json"
[metrics]
listen = "127.0.0.1:1"
[port.mtu]
net = "null"
socket-path = "/mtu"
mtu = 9000
socket-mode = "0660"
[port.mode]
net = "null"
socket-path = "/mode"
socket-group = "kvm"
[port.stays]
socket-path = "/stays"
net = "null"
[port.comes]
net = "null"
socket-path = "/gone"
`)
	want := Plan{
		Steps: []Step{
			{Action: Remove, Kind: KindPort, Name: "gone"},
			{Action: Reopen, Kind: KindPort, Name: "mtu", Keys: []string{"mtu", "socket-mode"}},
			{Action: Change, Kind: KindPort, Name: "mode", Keys: []string{"socket-group"}},
			{Action: Add, Kind: KindPort, Name: "comes"},
		},
		Unchanged: 1, Live: []string{"log.level"}, Restart: []string{"log.format", "metrics.listen"},
	}
	if diff := cmp.Diff(want, Compare(old, now)); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	if p := Compare(now, now); len(p.Steps) != 0 || p.Unchanged != 4 || p.Live != nil || p.Restart != nil {
		t.Errorf("a file against itself: %+v", p)
	}
}

// TestCompareSwitches: rules change in place; a switch that changes takes with it what hangs on it, and nothing else.
func TestCompareSwitches(t *testing.T) {
	const ports = "[port.a]\nswitch = \"x\"\n[port.b]\nswitch = \"y\"\n[uplink.u]\nnet = \"null\"\nswitch = \"x\"\n[defaults]\nsocket-path = \"/{port}\"\n"
	old := parse(t, "[switch.x]\n[switch.y]\n"+ports)
	for _, c := range []struct {
		text string
		want []Step
	}{
		{"[switch.x]\n[switch.y]\nmtu = 9000\n" + ports, []Step{
			{Action: Reopen, Kind: KindSwitch, Name: "y", Keys: []string{"mtu"}}, {Action: Reopen, Kind: KindPort, Name: "b", Keys: []string{"switch.y"}},
		}},
		{"[switch.x]\nhold = \"1ms\"\n[switch.y]\n" + ports + "isolated = true\n", []Step{
			{Action: Reopen, Kind: KindSwitch, Name: "x", Keys: []string{"hold"}}, {Action: Reopen, Kind: KindUplink, Name: "u", Keys: []string{"switch.x"}},
			{Action: Reopen, Kind: KindPort, Name: "a", Keys: []string{"switch.x", "isolated"}}, {Action: Change, Kind: KindPort, Name: "b", Keys: []string{"isolated"}},
		}},
		{"[switch.x]\n[switch.y]\n" + strings.Replace(ports, `net = "null"`, "net = \"null\"\nvlan.trunk = [\"1-10\"]", 1), []Step{
			{Action: Change, Kind: KindUplink, Name: "u", Keys: []string{"vlan.trunk"}},
		}},
		{"[switch.y]\n" + strings.Replace(ports[:strings.Index(ports, "[uplink")], `"x"`, `"y"`, 1) + "[defaults]\nsocket-path = \"/{port}\"\n", []Step{
			{Action: Remove, Kind: KindSwitch, Name: "x"}, {Action: Remove, Kind: KindUplink, Name: "u"},
			{Action: Reopen, Kind: KindPort, Name: "a", Keys: []string{"switch"}},
		}},
	} {
		if diff := cmp.Diff(c.want, Compare(old, parse(t, c.text)).Steps); diff != "" {
			t.Errorf("%s\n-want +got\n%s", c.text, diff)
		}
	}
}

// FuzzParse: whatever the text, there is a Config or a list of problems, each with a line of the text.
func FuzzParse(f *testing.F) {
	f.Add([]byte(good))
	f.Add([]byte("port.a.b.c = [1, {x = 2}]\n[[port]]\n"))
	f.Add([]byte("[defaults]\nmtu = 1\nlog = 3"))
	f.Fuzz(func(t *testing.T, text []byte) {
		file := Parse("f", text)
		err := file.Err()
		var all *Problems
		if err == nil || !errors.As(err, &all) {
			return
		}
		for _, p := range all.List {
			if p.Line < 0 || p.Line > strings.Count(string(text), "\n")+1 || p.Err == nil {
				t.Errorf("%+v", p)
			}
		}
	})
}

// TestKeyOfManyParts: a key that is nothing but dots takes memory by its length, not by the square of it, and is blamed where it stands.
func TestKeyOfManyParts(t *testing.T) {
	text := []byte("[log]\n" + strings.Repeat("a.", 10000) + "a = 1\n")
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	err := Parse("f", text).Err()
	runtime.ReadMemStats(&after)
	if err == nil || !strings.Contains(err.Error(), "f:2: log.a: unknown key") {
		t.Errorf("%v", err)
	}
	if took := after.TotalAlloc - before.TotalAlloc; took > 32<<20 {
		t.Errorf("%d bytes of text took %d bytes of memory", len(text), took)
	}
}
