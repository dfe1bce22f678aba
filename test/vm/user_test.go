//go:build linux

package vm

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vhostd/vhostd/test/vm/netlab"
	"github.com/vhostd/vhostd/test/vm/rpc"
	"github.com/vhostd/vhostd/test/vm/stream"
	"github.com/vhostd/vhostd/virtio"
)

// The user-mode network's defaults.
const (
	userGateway = "10.0.2.2"
	userDNS     = "10.0.2.3"
	userGuest   = "10.0.2.15/24"
	userNet6    = "fd00::"
	userHost6   = "fd00::2"
	nobody      = 65534
	forwarded   = 18080 // on the host's loopback, to the guest's port 8080
)

// newUserRig is a rig whose guest hangs on the user-mode network of a vhostd without any privilege.
func newUserRig(t *testing.T, props ...string) *rig {
	t.Helper()
	r := newRig(t, "user")
	r.mopts.DeviceProps = props
	stop, err := r.ns.ServeDNS(t.TempDir())
	must(t, err)
	t.Cleanup(stop)
	if qemuBackend() {
		r.mopts.Netdev = fmt.Sprintf("user,id=n0,hostfwd=tcp:127.0.0.1:%d-:8080", forwarded)
	}
	must(t, os.Chown(r.dopts.Dir, nobody, nobody))
	r.dopts.User = nobody
	r.dopts.Args = []string{"--hostfwd", fmt.Sprintf("tcp:127.0.0.1:%d-:8080", forwarded)}
	r.startVhostd()
	r.boot()
	return r
}

// TestUser: what a guest without any set-up gets from the user-mode network.
func TestUser(t *testing.T) {
	r := newUserRig(t)
	r.dhcp()
	r.ping(userGateway, 56)
	r.ping(userGateway, 1472)
	r.lookup()
	r.download(32 << 20)
	r.tcp(userGateway, 128<<20)
	r.udp(userGateway, 8, 1472)
	r.ipv6()
	r.forward(8 << 20)
	r.healthy()
}

// TestUserNoOffloads: the same for a guest that makes and checks every checksum itself, and takes no segment larger than
// its MTU.
func TestUserNoOffloads(t *testing.T) {
	r := newUserRig(t, noOffloads...)
	r.dhcp()
	r.features(virtio.FVersion1, offloadBits)
	r.ping(userGateway, 1472)
	r.lookup()
	r.tcp(userGateway, smallSize)
	r.udp(userGateway, 8, 1472)
	r.ipv6()
	r.forward(8 << 20)
	r.healthy()
}

// dhcp configures the guest by DHCP, with u-root's client.
func (r *rig) dhcp() {
	r.t.Helper()
	r.link(rpc.LinkArgs{Name: "eth0", Wait: 20 * time.Second, Up: true})
	r.exec("dhclient", "-ipv6=false", "-timeout=10", "eth0")
	l := r.link(rpc.LinkArgs{Name: "eth0"})
	resolv, err := r.vm.ReadFile(r.ctx, "/etc/resolv.conf")
	must(r.t, err)
	r.logf("DHCP: guest has %v, default route via %v, resolv.conf %q", l.Addrs, l.Gateways, resolv)
	if !slices.Contains(l.Addrs, userGuest) {
		r.t.Errorf("guest's addresses %v, want %s among them", l.Addrs, userGuest)
	}
	if !strings.Contains(resolv, userDNS) {
		r.t.Errorf("guest's resolv.conf %q, want %s in it", resolv, userDNS)
	}
	if !slices.Contains(l.Gateways, userGateway) {
		r.t.Errorf("guest's default routes go via %v, want %s", l.Gateways, userGateway)
	}
}

// ipv6: the guest's kernel takes an address from the router's advertisement, and reaches the host by it.
func (r *rig) ipv6() {
	r.t.Helper()
	var l rpc.LinkResult
	eventually(r.t, 30*time.Second, "an IPv6 address from a router advertisement", func() bool {
		l = r.link(rpc.LinkArgs{Name: "eth0"})
		return slices.ContainsFunc(l.Addrs, func(a string) bool { return strings.HasPrefix(a, userNet6) })
	})
	r.logf("IPv6: guest has %v, default routes via %v", l.Addrs, l.Gateways)
	r.ping(userHost6, 1452)
	r.tcp(userHost6, 32<<20)
	r.udp(userHost6, 1452)
}

// lookup asks the network's name server, over both transports, for a name that exists and one that does not.
func (r *rig) lookup() {
	r.t.Helper()
	for _, tcp := range []bool{false, true} {
		if tcp && qemuBackend() {
			continue
		}
		a := rpc.LookupArgs{Server: net.JoinHostPort(userDNS, "53"), Name: netlab.DNSName, TCP: tcp}
		addrs, err := r.vm.Lookup(r.ctx, a)
		must(r.t, err)
		r.logf("DNS (tcp %v): %s is %v", tcp, a.Name, addrs)
		if !slices.Contains(addrs, netlab.DNSAddr4) || !slices.Contains(addrs, netlab.DNSAddr6) {
			r.t.Errorf("DNS (tcp %v): %v, want %s and %s", tcp, addrs, netlab.DNSAddr4, netlab.DNSAddr6)
		}
		a.Name = "no-such-name.vhostd.test"
		if addrs, err := r.vm.Lookup(r.ctx, a); err == nil || !strings.Contains(err.Error(), "no such host") {
			r.t.Errorf("DNS (tcp %v): %s is %v, %v, want no such host", tcp, a.Name, addrs, err)
		}
	}
}

// download fetches n bytes from the host's loopback, by way of the gateway's address.
func (r *rig) download(n int64) {
	r.t.Helper()
	url := fmt.Sprintf("http://%s/%d", netlab.At(userGateway, r.servers.HTTP), n)
	h, err := r.vm.HTTP(r.ctx, url)
	must(r.t, err)
	r.logf("HTTP GET %s: status %d, %d bytes, %.1f MiB/s, crc32c %08x", url, h.Status, h.Bytes,
		float64(h.Bytes)/(1<<20)/h.Elapsed.Seconds(), h.CRC32C)
	if h.Status != 200 || h.Bytes != n || h.CRC32C != stream.BodyCRC(uint64(n)) {
		r.t.Errorf("HTTP GET %s: %+v, want %d bytes with crc32c %08x", url, h, n, stream.BodyCRC(uint64(n)))
	}
}

// forward fetches n bytes from a server in the guest, through the forwarded port.
func (r *rig) forward(n int64) {
	r.t.Helper()
	must(r.t, r.vm.Serve(r.ctx, rpc.ServeArgs{HTTP: 8080}))
	client := http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(_ context.Context, network, addr string) (c net.Conn, err error) {
			err = r.ns.Do(func() error { c, err = net.Dial(network, addr); return err })
			return c, err
		}}}
	url := fmt.Sprintf("http://127.0.0.1:%d/%d", forwarded, n)
	resp, err := client.Get(url)
	must(r.t, err)
	defer resp.Body.Close()
	sum := &stream.CRC{}
	got, err := io.Copy(sum, resp.Body)
	must(r.t, err)
	r.logf("port forward: GET %s from the guest: status %d, %d bytes, crc32c %08x", url, resp.StatusCode, got, sum.Sum)
	if got != n || sum.Sum != stream.BodyCRC(uint64(n)) {
		r.t.Errorf("port forward: %d bytes with crc32c %08x, want %d with %08x", got, sum.Sum, n, stream.BodyCRC(uint64(n)))
	}
}
