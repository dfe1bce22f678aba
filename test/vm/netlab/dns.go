//go:build linux

package netlab

import (
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// The one name that a name server of ServeDNS knows.
const (
	DNSName  = "guest.vhostd.test"
	DNSAddr4 = "192.0.2.7"
	DNSAddr6 = "2001:db8::7"
)

// ServeDNS starts a name server at 127.0.0.1:53 inside and makes it the resolver of what is started inside from now
// on: those processes see a resolv.conf of their own. Dir is for that file. The caller calls the function returned.
func (n *Namespace) ServeDNS(dir string) (stop func(), err error) {
	conf := filepath.Join(dir, "resolv.conf")
	if err := os.WriteFile(conf, []byte("nameserver 127.0.0.1\n"), 0o644); err != nil {
		return nil, err
	}
	if err := n.Do(func() error { return shadowFile(conf, "/etc/resolv.conf") }); err != nil {
		return nil, fmt.Errorf("resolv.conf of the namespace: %w", err)
	}
	var pc net.PacketConn
	var l net.Listener
	err = n.Do(func() (err error) {
		if pc, err = net.ListenPacket("udp", "127.0.0.1:53"); err != nil {
			return err
		}
		l, err = net.Listen("tcp", "127.0.0.1:53")
		return err
	})
	if err != nil {
		return nil, err
	}
	udp := &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(answer)}
	tcp := &dns.Server{Listener: l, Handler: dns.HandlerFunc(answer)}
	go func() { _ = udp.ActivateAndServe() }()
	go func() { _ = tcp.ActivateAndServe() }()
	return func() { pc.Close(); l.Close() }, nil
}

// shadowFile lets this thread, and what it starts, see file in place of target.
func shadowFile(file, target string) error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	target, err := filepath.EvalSymlinks(target)
	if err != nil {
		return err
	}
	return unix.Mount(file, target, "", unix.MS_BIND, "")
}

func answer(w dns.ResponseWriter, q *dns.Msg) {
	m := new(dns.Msg)
	m.SetReply(q)
	for _, question := range q.Question {
		if question.Name != dns.Fqdn(DNSName) {
			m.Rcode = dns.RcodeNameError
			continue
		}
		h := dns.RR_Header{Name: question.Name, Rrtype: question.Qtype, Class: dns.ClassINET, Ttl: 60}
		switch question.Qtype {
		case dns.TypeA:
			m.Answer = append(m.Answer, &dns.A{Hdr: h, A: net.ParseIP(DNSAddr4)})
		case dns.TypeAAAA:
			m.Answer = append(m.Answer, &dns.AAAA{Hdr: h, AAAA: net.ParseIP(DNSAddr6)})
		}
	}
	_ = w.WriteMsg(m)
}
