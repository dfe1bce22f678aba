package main

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/vhostd/vhostd/netdev"
)

// FuzzNet reads what --net may say, of all kinds of devices. It is understood in the same way each time, whatever the other flags have settled, or
// refused with an error of one line that tells the option.
func FuzzNet(f *testing.F) {
	for _, k := range kinds {
		f.Add(k.name, uint8(0), 0)
	}
	for _, spec := range []string{
		"user,net=10.9.0.0/16,hostfwd=tcp::22-:22,mtu=9000,restrict=on,dnssearch=a.example", "tap:tap0,bridge=br0,mtu=1500", "tap,fd=3,fd=4", "tap:m,macvtap=eth0",
		"packet:eth0,queues=2,fanout=hash,promisc=off", "xdp:eth0,queue=1,mode=copy,no-balloon=on", "null,generate=on,size=60,count=9", "null,echo=on",
		"vxlan:vni=42,remote=10.0.0.1;[fd00::1]:99,local=10.0.0.2,port=4789,zerocopy=on", "geneve:vni=1,remote=239.1.1.1%eth0", "dgram:local=127.0.0.1:1,remote=127.0.0.1:2",
		"vxlan:vni=16777216,remote=::", "tap:averyveryverylongname", "user,net=::/0,net6=1.1.1.1/8", "null,size=-1", "packet:,queues=99999999999999999999", "user:,,=,",
	} {
		f.Add(spec, uint8(1), 1500)
		f.Add(spec, uint8(0x82), -1)
	}
	f.Fuzz(func(t *testing.T, spec string, queues uint8, mtu int) {
		s := settings{flags: flags{net: spec, mtu: mtu, queues: int(queues)}, dash: "--", inherits: queues&0x80 == 0}
		if queues&0x40 != 0 {
			s.policy = netdev.On
		}
		again := s
		open, err := parseDevice(&s)
		_, err2 := parseDevice(&again)
		if (err == nil) != (open != nil) || (err == nil) != (err2 == nil) || err != nil && err.Error() != err2.Error() || s.queues != again.queues {
			t.Fatalf("%q is %v, then %v", spec, err, err2)
		}
		if err == nil {
			return
		}
		text := err.Error()
		switch {
		case strings.TrimSpace(text) == "" || len(text) > 12*len(spec)+4000: // quoted, twice, at four characters a byte
			t.Fatalf("%d bytes of options, %d bytes of error: %.200q", len(spec), len(text), text)
		case !strings.ContainsAny(spec, "\n\r") && strings.ContainsAny(text, "\n\r"):
			t.Fatalf("%q: an error of several lines: %q", spec, text)
		case utf8.ValidString(spec) && !utf8.ValidString(text):
			t.Fatalf("%q: error %q is not text", spec, text)
		}
	})
}
