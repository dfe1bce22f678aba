package netopt_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vhostd/vhostd/internal/netopt"
)

type options struct {
	MTU     int
	Persist bool
	Remotes []string
}

var keys = netopt.Keys[options]{
	{Name: "mtu", Value: "BYTES", Set: func(o *options, v string) (err error) { o.MTU, err = netopt.Number(v, 68, 9000); return }},
	{Name: "persist", Value: "on|off", Bare: "on", Set: func(o *options, v string) (err error) { o.Persist, err = netopt.OnOff(v); return }},
	{Name: "remote", Value: "ADDR", Many: true, Set: func(o *options, v string) error { o.Remotes = append(o.Remotes, v); return nil }},
}

func TestParse(t *testing.T) {
	for s, want := range map[string]options{
		"":                           {},
		",,":                         {},
		"mtu=68":                     {MTU: 68},
		"mtu=9000,persist":           {MTU: 9000, Persist: true},
		"persist=off":                {},
		"remote=a=b,persist=on,":     {Persist: true, Remotes: []string{"a=b"}},
		"remote=a,mtu=1500,remote=b": {MTU: 1500, Remotes: []string{"a", "b"}},
	} {
		var got options
		given, err := keys.Parse(&got, netopt.Split(s))
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("%q: %v (-want +got):\n%s", s, err, diff)
		}
		for _, k := range keys {
			if given[k.Name] != strings.Contains(s, k.Name) {
				t.Errorf("%q: %s given: %v", s, k.Name, given[k.Name])
			}
		}
	}
}

func TestParseRefuses(t *testing.T) {
	const known = "mtu=BYTES, persist=on|off, remote=ADDR"
	for s, want := range map[string]string{
		"":                 `"": want KEY=VALUE, of ` + known,
		"mtu":              `"mtu": want KEY=VALUE, of ` + known,
		"colour":           `"colour": want KEY=VALUE, of ` + known,
		"colour=red":       `unknown key "colour": known are ` + known,
		"=1":               `unknown key "": known are ` + known,
		"mtu=100,mtu=x":    "mtu is given twice",
		"persist,persist":  "persist is given twice",
		"mtu=67":           "mtu=67: want a number from 68 to 9000",
		"mtu=9001":         "mtu=9001: want a number from 68 to 9000",
		"mtu=9k":           "mtu=9k: want a number from 68 to 9000",
		"mtu=":             "mtu=: want a number from 68 to 9000",
		"persist=yes":      "persist=yes: want on or off",
		"remote=a,persist": "",
	} {
		_, err := keys.Parse(new(options), strings.SplitSeq(s, ","))
		if want == "" && err == nil {
			continue
		}
		if err == nil || err.Error() != want {
			t.Errorf("%q: %v, want %s", s, err, want)
		}
	}
}

func TestCheckInterface(t *testing.T) {
	for name, ok := range map[string]bool{
		"eth0": true, "a": true, "a.b-c_d@e": true, "...": true, strings.Repeat("x", netopt.MaxInterface): true,
		"": false, ".": false, "..": false, "a/b": false, "a:1": false, "a b": false, "a\n": false, strings.Repeat("x", netopt.MaxInterface+1): false,
	} {
		err := netopt.CheckInterface(name)
		if (err == nil) != ok || netopt.IsInterface(name) != ok {
			t.Errorf("%q: %v, want %v", name, err, ok)
		}
		if err != nil && !strings.Contains(err.Error(), "no interface name: want 1 to 15 characters") {
			t.Errorf("%q: %v", name, err)
		}
	}
}
