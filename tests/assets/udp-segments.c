/* Datagrams of which one write makes many (UDP_SEGMENT): the kernel leaves that to a card that can do it.
 *     udp-segments ADDRESS    sends them there by eth0 until that end says that it has all
 *     udp-segments            takes them, and says how many there were, each as it was sent
 */
#include <arpa/inet.h>
#include <linux/ethtool.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <netinet/udp.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif

enum { LENGTH = 1200, COUNT = 40 };

static unsigned char bytes[COUNT][LENGTH];

static void fill(void)
{
	for (int i = 0; i < COUNT; i++)
		for (int at = 0; at < LENGTH; at++)
			bytes[i][at] = at ? i * 31 + at * 7 + (at >> 8) : i;
}

/* virtio_net leaves it off until somebody asks: `ethtool -K eth0 tx-udp-segmentation on`. */
static int turn_on(int fd)
{
	static struct {
		struct ethtool_gstrings head;
		char names[256][ETH_GSTRING_LEN];
	} all = { .head = { .cmd = ETHTOOL_GSTRINGS, .string_set = ETH_SS_FEATURES } };
	static struct {
		struct ethtool_sfeatures head;
		struct ethtool_set_features_block blocks[8];
	} set = { .head = { .cmd = ETHTOOL_SFEATURES } };
	struct ifreq request = { .ifr_name = "eth0", .ifr_data = (char *)&all };

	if (ioctl(fd, SIOCETHTOOL, &request) < 0)
		return -1;
	for (unsigned i = 0; i < all.head.len; i++)
		if (!strcmp(all.names[i], "tx-udp-segmentation"))
			set.blocks[i / 32].valid = set.blocks[i / 32].requested = 1u << i % 32;
	set.head.size = (all.head.len + 31) / 32;
	request.ifr_data = (char *)&set;
	return ioctl(fd, SIOCETHTOOL, &request);
}

static int give(int fd, const char *address)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(5001) };
	struct timeval patience = { .tv_usec = 300000 };
	int size = LENGTH;
	char said;

	inet_pton(AF_INET, address, &to.sin_addr);
	if (turn_on(fd))
		return perror("tx-udp-segmentation"), 1;
	if (connect(fd, (struct sockaddr *)&to, sizeof to) || setsockopt(fd, IPPROTO_UDP, UDP_SEGMENT, &size, sizeof size) ||
	    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience))
		return perror("udp-segments"), 1;
	/* Nobody may listen yet. */
	for (int tries = 0; tries < 300; tries++) {
		send(fd, bytes, sizeof bytes, 0);
		if (recv(fd, &said, 1, 0) == 1)
			return 0;
	}
	return 1;
}

static int take(int fd)
{
	struct sockaddr_in own = { .sin_family = AF_INET, .sin_port = htons(5001) }, from;
	struct timeval patience = { .tv_sec = 120 };
	unsigned char got[2 * LENGTH], seen[COUNT] = { 0 };
	socklen_t length = sizeof from;
	int all = 0;

	if (bind(fd, (struct sockaddr *)&own, sizeof own) || setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience))
		return perror("udp-segments"), 1;
	while (all < COUNT) {
		if (recvfrom(fd, got, sizeof got, 0, (struct sockaddr *)&from, &length) != LENGTH || got[0] >= COUNT ||
		    memcmp(got, bytes[got[0]], LENGTH))
			return puts("segments=wrong"), 1;
		all += !seen[got[0]];
		seen[got[0]] = 1;
	}
	sendto(fd, "", 1, 0, (struct sockaddr *)&from, length);
	printf("segments=%d\n", all);
	return 0;
}

int main(int count, char **words)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	fill();
	return count > 1 ? give(fd, words[1]) : take(fd);
}
