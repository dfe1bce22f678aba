package user

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"

	"github.com/vhostd/vhostd/internal/vhosttest"
)

// query asks the device's name server.
func (g *guest) query(server netip.Addr, network, name string, kind uint16) *dns.Msg {
	g.Helper()
	q := new(dns.Msg).SetQuestion(dns.Fqdn(name), kind)
	q.SetEdns0(1232, false)
	for end := time.Now().Add(testTimeout); time.Now().Before(end); {
		var c net.Conn
		if network == "tcp" {
			c = g.mustDial(server, dnsPort)
		} else {
			c = g.dialUDP(server, dnsPort)
		}
		client := dns.Client{Net: network, Timeout: dnsTimeout}
		r, _, err := client.ExchangeWithConn(q, &dns.Conn{Conn: c})
		c.Close()
		if err == nil {
			return r
		}
	}
	g.Fatalf("%s: no answer over %s", name, network)
	return nil
}

// answers are the addresses and names in r, sorted.
func answers(r *dns.Msg) []string {
	var s []string
	for _, rr := range r.Answer {
		switch rr := rr.(type) {
		case *dns.A:
			s = append(s, rr.A.String())
		case *dns.AAAA:
			s = append(s, rr.AAAA.String())
		case *dns.PTR:
			s = append(s, rr.Ptr)
		case *dns.TXT:
			s = append(s, fmt.Sprint(len(strings.Join(rr.Txt, ""))))
		}
	}
	slices.Sort(s)
	return s
}

// samePort listens for datagrams and connections on one port, which for either alone may be another's.
func samePort(t *testing.T) (pc net.PacketConn, l net.Listener) {
	t.Helper()
	vhosttest.Eventually(t, "a port that is free for both", func() bool {
		var err error
		l, err = net.Listen("tcp4", "127.0.0.1:0")
		must(t, err)
		if pc, err = net.ListenPacket("udp4", l.Addr().String()); err != nil {
			l.Close()
		}
		return err == nil
	})
	return pc, l
}

// upstream is a name server of the host's.
func upstream(t *testing.T, d *Device) {
	t.Helper()
	h := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		r := new(dns.Msg).SetReply(q)
		name := q.Question[0].Name
		head := dns.RR_Header{Name: name, Rrtype: q.Question[0].Qtype, Class: dns.ClassINET, Ttl: 1}
		switch name {
		case "far.example.":
			r.Answer = append(r.Answer, &dns.A{Hdr: head, A: net.IPv4(192, 0, 2, 99)})
		case "big.example.":
			for range 20 {
				r.Answer = append(r.Answer, &dns.TXT{Hdr: head, Txt: []string{strings.Repeat("x", 200)}})
			}
			if w.LocalAddr().Network() == "udp" {
				r.Truncate(int(q.IsEdns0().UDPSize()))
			}
		default:
			r.Rcode = dns.RcodeNameError
		}
		w.WriteMsg(r)
	})
	pc, l := samePort(t)
	for _, srv := range []*dns.Server{{PacketConn: pc, Handler: h}, {Listener: l, Handler: h}} {
		started, done := make(chan struct{}), make(chan struct{})
		srv.NotifyStartedFunc = func() { close(started) }
		go func() {
			defer close(done)
			srv.ActivateAndServe()
		}()
		<-started
		t.Cleanup(func() { srv.Shutdown(); <-done })
	}
	// resolv.conf cannot name a port: the list is set as if it had been read.
	d.dns.upstream.list()
	d.dns.upstream.mu.Lock()
	defer d.dns.upstream.mu.Unlock()
	d.dns.upstream.servers = []string{pc.LocalAddr().String()}
}

func TestDNSAnswersFromFileAndUpstream(t *testing.T) {
	d := openTest(t, "")
	upstream(t, d)
	g := newGuest(t, d, guestOptions{features: offloads, address: true})
	g.waitAddress(guestIP6)
	for _, c := range []struct {
		name string
		kind uint16
		want []string
	}{
		{"printer.example", dns.TypeA, []string{"192.0.2.7"}},
		{"PRINTER.example", dns.TypeAAAA, []string{"2001:db8::7"}},
		{"printer.example", dns.TypeMX, nil},
		{"7.2.0.192.in-addr.arpa", dns.TypePTR, []string{"printer.example."}},
		{"host.vhostd", dns.TypeA, []string{"10.0.2.2"}},
		{"gateway", dns.TypeAAAA, []string{"fd00::2"}},
		{"2.2.0.10.in-addr.arpa", dns.TypePTR, []string{"host.vhostd."}},
		{"thishost", dns.TypeA, []string{"10.0.2.2"}}, // the host's loopback
		{"localhost", dns.TypeA, []string{"127.0.0.1"}},
		{"far.example", dns.TypeA, []string{"192.0.2.99"}},
	} {
		for _, server := range []netip.Addr{dnsIP, netip.MustParseAddr("fd00::3")} {
			for _, network := range []string{"udp", "tcp"} {
				r := g.query(server, network, c.name, c.kind)
				if diff := cmp.Diff(c.want, answers(r)); diff != "" || r.Rcode != dns.RcodeSuccess {
					t.Errorf("%s %s over %s: %s\n%s", c.name, dns.TypeToString[c.kind], network, dns.RcodeToString[r.Rcode], diff)
				}
			}
		}
	}
	if r := g.query(dnsIP, "udp", "nowhere.example", dns.TypeA); r.Rcode != dns.RcodeNameError {
		t.Errorf("nowhere.example: %s", dns.RcodeToString[r.Rcode])
	}
	if r := g.query(dnsIP, "udp", "big.example", dns.TypeTXT); !r.Truncated {
		t.Errorf("big.example over UDP is not truncated")
	}
	if r := g.query(dnsIP, "tcp", "big.example", dns.TypeTXT); len(r.Answer) != 20 {
		t.Errorf("big.example over TCP has %d answers, want 20", len(r.Answer))
	}
}

func TestDNSWithoutUpstream(t *testing.T) {
	g := newGuest(t, openTest(t, "ipv6=off"), guestOptions{features: offloads, address: true})
	if r := g.query(dnsIP, "udp", "far.example", dns.TypeA); r.Rcode != dns.RcodeServerFailure {
		t.Errorf("%s, want a server failure", dns.RcodeToString[r.Rcode])
	}
	if got := answers(g.query(dnsIP, "udp", "printer.example", dns.TypeA)); !slices.Equal(got, []string{"192.0.2.7"}) {
		t.Errorf("%v", got)
	}
}

func TestDNSFilesAreReadAgain(t *testing.T) {
	dir := t.TempDir()
	u := upstreams{path: dir + "/resolv.conf"}
	h := hostsFile{path: dir + "/hosts"}
	if s := u.list(); s != nil {
		t.Errorf("%v without a file", s)
	}
	if a := h.lookup("a"); a != nil {
		t.Errorf("%v without a file", a)
	}
	must(t, os.WriteFile(u.path, []byte("nameserver 192.0.2.1\nnameserver 2001:db8::1\n"), 0o600))
	must(t, os.WriteFile(h.path, []byte("::1 a\n"), 0o600))
	u.file.checked, h.file.checked = time.Time{}, time.Time{}
	if diff := cmp.Diff([]string{"192.0.2.1:53", "[2001:db8::1]:53"}, u.list()); diff != "" {
		t.Error(diff)
	}
	if a := h.lookup("a"); len(a) != 1 || a[0] != netip.IPv6Loopback() {
		t.Errorf("%v", a)
	}
}

func TestDNSBoundsQueries(t *testing.T) {
	d := openTest(t, "")
	for range maxQueries {
		d.dns.slots <- struct{}{}
	}
	q := new(dns.Msg).SetQuestion("printer.example.", dns.TypeA)
	if r := d.dns.resolve(q, "udp"); r != nil {
		t.Errorf("query %d is answered", maxQueries+1)
	}
	<-d.dns.slots
	if r := d.dns.resolve(q, "udp"); r == nil || len(d.dns.slots) != maxQueries-1 {
		t.Errorf("with a slot free: %v, and %d are taken", r, len(d.dns.slots))
	}
}

// TestDNSCloseWithASilentUpstream: closing does not wait for answers that do not come.
func TestDNSCloseWithASilentUpstream(t *testing.T) {
	pc, err := net.ListenPacket("udp4", "127.0.0.1:0")
	must(t, err)
	defer pc.Close()
	d := openTest(t, "ipv6=off")
	d.dns.upstream.list()
	d.dns.upstream.mu.Lock()
	d.dns.upstream.servers = []string{pc.LocalAddr().String()}
	d.dns.upstream.mu.Unlock()
	g := newGuest(t, d, guestOptions{features: offloads, address: true})
	q, err := new(dns.Msg).SetQuestion("far.example.", dns.TypeA).Pack()
	must(t, err)
	pc.SetReadDeadline(time.Now().Add(testTimeout))
	c := g.dialUDP(dnsIP, dnsPort)
	_, err = c.Write(q)
	must(t, err)
	if _, _, err := pc.ReadFrom(make([]byte, 512)); err != nil {
		t.Fatalf("the query never got there: %v", err)
	}
	start := time.Now()
	d.g.stop()
	d.dns.close()
	if took := time.Since(start); took > dnsTimeout/2 {
		t.Errorf("closing took %v", took)
	}
}
