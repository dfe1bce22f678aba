package user

import (
	"bufio"
	"context"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// recheck is how often a file is looked at for changes.
const recheck = time.Second

// watched is a file that is read again when it has changed.
type watched struct {
	checked time.Time
	mtime   time.Time
	size    int64
}

// changed reports whether path is to be read now. A file that is gone counts as changed once.
func (w *watched) changed(path string) bool {
	now := time.Now()
	if now.Sub(w.checked) < recheck {
		return false
	}
	w.checked = now
	var mtime time.Time
	size := int64(-1)
	if st, err := os.Stat(path); err == nil {
		mtime, size = st.ModTime(), st.Size()
	}
	if mtime.Equal(w.mtime) && size == w.size {
		return false
	}
	w.mtime, w.size = mtime, size
	return true
}

// upstreams are the host's name servers.
type upstreams struct {
	path string

	mu      sync.Mutex
	file    watched
	servers []string // HOST:PORT
}

var errNoServer = errors.New("the host has no name server")

func (u *upstreams) list() []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.file.changed(u.path) {
		conf, err := dns.ClientConfigFromFile(u.path)
		if errors.Is(err, fs.ErrPermission) {
			return u.servers // it was replaced by a file that this process may not read: what it said before is the best there is
		}
		u.servers = nil
		if err == nil {
			for _, s := range conf.Servers {
				u.servers = append(u.servers, net.JoinHostPort(s, conf.Port))
			}
		}
	}
	return u.servers
}

// maxUDPAnswer in bytes is what an answer over UDP is read up to.
const maxUDPAnswer = 65535

// exchange asks the name servers, each in turn, until one answers. The answer has the query's ID.
func (u *upstreams) exchange(ctx context.Context, q *dns.Msg, network string) (*dns.Msg, error) {
	servers := u.list()
	err := error(errNoServer)
	for i, server := range servers {
		// What is left of the time is shared by the servers that are left.
		deadline, _ := ctx.Deadline()
		client := dns.Client{Net: network, Timeout: time.Until(deadline) / time.Duration(len(servers)-i), UDPSize: maxUDPAnswer}
		var r *dns.Msg
		if r, err = ask(ctx, &client, q, server); err == nil && r.Rcode != dns.RcodeServerFailure {
			r.Id = q.Id
			return r, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err == nil {
			err = errors.New("server failure")
		}
	}
	return nil, err
}

// ask asks one name server. It returns as soon as ctx ends.
func ask(ctx context.Context, client *dns.Client, q *dns.Msg, server string) (*dns.Msg, error) {
	conn, err := client.DialContext(ctx, server)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	query := q.Copy()
	query.Id = dns.Id()
	r, _, err := client.ExchangeWithConnContext(ctx, query, conn)
	return r, err
}

// hostsFile is names from a file in the form of hosts(5).
type hostsFile struct {
	path string

	mu     sync.Mutex
	file   watched
	byName map[string][]netip.Addr
	byAddr map[string][]string // by the name in in-addr.arpa or ip6.arpa
}

// maxHosts bounds the lines of the file that are used.
const maxHosts = 100_000

func (h *hostsFile) load() {
	if !h.file.changed(h.path) {
		return
	}
	f, err := os.Open(h.path)
	if errors.Is(err, fs.ErrPermission) && h.byName != nil {
		return // as above
	}
	h.byName, h.byAddr = make(map[string][]netip.Addr), make(map[string][]string)
	if err != nil {
		return // no file, no names
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for n := 0; n < maxHosts && lines.Scan(); n++ {
		line, _, _ := strings.Cut(lines.Text(), "#")
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		a, err := netip.ParseAddr(fields[0])
		if err != nil || a.Zone() != "" {
			continue
		}
		a = a.Unmap()
		for _, name := range fields[1:] {
			name = strings.ToLower(strings.TrimSuffix(name, "."))
			h.byName[name] = append(h.byName[name], a)
		}
		arpa := reverseName(a)
		h.byAddr[arpa] = append(h.byAddr[arpa], fields[1])
	}
}

func (h *hostsFile) lookup(name string) []netip.Addr {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.load()
	return h.byName[name]
}

func (h *hostsFile) reverse(arpa string) []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.load()
	return h.byAddr[arpa]
}
