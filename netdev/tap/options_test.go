package tap

import (
	"net"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseOptions(t *testing.T) {
	on, off := true, false
	mac := net.HardwareAddr{0x52, 0x54, 0, 0x12, 0x34, 0x56}
	for s, want := range map[string]Options{
		"tap":                                    {},
		"tap:":                                   {},
		"tap:vnet0":                              {Name: "vnet0"},
		"vnet0":                                  {Name: "vnet0"},
		"tap:queues":                             {Name: "queues"},
		"tap:vnet0,bridge=br0,mtu=9000,queues=2": {Name: "vnet0", Bridge: "br0", MTU: 9000, Queues: 2},
		"tap:t,mac=52:54:00:12:34:56,up=off":     {Name: "t", MAC: mac, Up: &off},
		"tap:t,up=on,persist":                    {Name: "t", Up: &on, Persist: true},
		"tap:t,persist=off":                      {Name: "t"},
		"tap:queues=4":                           {Queues: 4},
		"tap:fd=3":                               {FDs: []int{3}},
		"tap:fds=3:4:7,queues=3":                 {FDs: []int{3, 4, 7}, Queues: 3},
		"tap:macvtap=/dev/tap7,queues=2":         {Macvtap: "/dev/tap7", Queues: 2},
		"tap:macvtap=mv0":                        {Macvtap: "mv0"},
		"tap:t,io-uring=auto":                    {Name: "t"},
		"tap:t,io-uring=on":                      {Name: "t", IOUring: BatchAlways},
		"tap:t,io-uring=off":                     {Name: "t", IOUring: BatchNever},
	} {
		got, err := ParseOptions(s)
		if err != nil {
			t.Errorf("%q: %v", s, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%q (-want +got):\n%s", s, diff)
		}
	}
}

func TestParseOptionsErrors(t *testing.T) {
	for s, want := range map[string]string{
		"tap:vnet0,colour=red":        `unknown key "colour": known are queues=N, bridge=NAME, mtu=BYTES, mac=ADDRESS`,
		"tap:vnet0,bridge":            `"bridge": want KEY=VALUE, of queues=N`,
		"tap:vnet0,":                  "want KEY=VALUE",
		"tap:vnet0,mtu=67":            "mtu=67: want a number from 68 to 65521",
		"tap:vnet0,mtu=9k":            "mtu=9k: want a number",
		"tap:vnet0,queues=0":          "queues=0: want a number from 1 to 256",
		"tap:vnet0,queues=257":        "queues=257: want a number from 1 to 256",
		"tap:vnet0,mtu=1500,mtu=9":    "mtu is given twice",
		"tap:vnet0,up=maybe":          "up=maybe: want on or off",
		"tap:vnet0,mac=52:54":         "want an address like",
		"tap:t,mac=01:00:5e:00:00:01": "multicast",
		"tap:a-name-that-is-too-long": "no interface name",
		"tap:a/b":                     "no interface name",
		"tap:.":                       "no interface name",
		"tap:t,bridge=":               "no interface name",
		"tap:t,io-uring=maybe":        "io-uring=maybe: want auto, on or off",
		"tap:t,fd=3":                  "exclude each other",
		"tap:t,macvtap=m":             "exclude each other",
		"tap:fd=3,macvtap=m":          "exclude each other",
		"tap:fd=3,fds=4":              "either fd= or fds=",
		"tap:fds=3:3":                 "descriptor 3 is given twice",
		"tap:fds=3:x":                 "descriptor numbers",
		"tap:fd=-1":                   "descriptor numbers",
		"tap:fds=3:4,queues=3":        "queues=3, but 2 descriptors are given",
		"tap:macvtap=m,persist":       "persists by itself",
	} {
		_, err := ParseOptions(s)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v, want one with %q", s, err, want)
		}
	}
}
